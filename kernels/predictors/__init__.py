"""Predictors of a transformer stack's residual on skipped sampling steps, side by side."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..errors import OptionError
from .base import MOMENTS, Predictor, Signals, judge, judged, moments
from .chebyshev import Chebyshev
from .damped import Damped
from .hermite import Hermite
from .pade import Pade
from .polynomial import Reuse, Taylor
from .tc_pade import TCPadePaper, TCPadeRelease

__all__ = [
    "MOMENTS", "PREDICTORS", "Predictor", "Signals", "judge", "judged", "moments",
    "predictor_name", "registered_name", "resolve",
]  # fmt: skip

PREDICTORS: dict[str, Predictor] = {
    "pade": Pade(),
    "pade-damped": Pade(start=0.3, turned=0.75),
    "pade-channel": Pade(granularity="channel"),
    "pade-token": Pade(granularity="token"),
    "reuse": Reuse(),
    "linear": Taylor(order=1),
    "taylor-1": Taylor(order=1),
    "taylor-2": Taylor(order=2),
    "taylor-3": Taylor(order=3),
    "damped": Damped(),
    "hermite": Hermite(),
    "chebyshev": Chebyshev(),
    "tc-pade-paper": TCPadePaper(newest_last=True),
    "tc-pade-paper-reversed": TCPadePaper(newest_last=False),
    "tc-pade-release": TCPadeRelease(),
}


def resolve(predictor: str | Predictor) -> Predictor:
    """The predictor of a name; one that is an object already comes back as it is.

    Raises OptionError with the known names for another name.
    """
    if not isinstance(predictor, str):
        return predictor
    if predictor not in PREDICTORS:
        raise OptionError(f"unknown predictor {predictor!r}; known: {', '.join(PREDICTORS)}")
    return PREDICTORS[predictor]


def registered_name(predictor: Predictor) -> str | None:
    """The name in `PREDICTORS` of an equal predictor; None where there is none."""
    for name, known in PREDICTORS.items():
        if type(known) is type(predictor) and known == predictor:
            return name
    return None


def predictor_name(predictor: str | Predictor) -> str:
    """What a predictor is called: its name, or its class and, of a dataclass, its fields.

    The same in every process: what is no number, text or tuple of them is named by its type.
    """
    if isinstance(predictor, str):
        return predictor
    name = registered_name(predictor)
    if name is not None:
        return name
    kind = type(predictor)
    plain: Any = predictor
    fields = dataclasses.fields(plain) if dataclasses.is_dataclass(plain) else ()
    values = ", ".join(f"{each.name}={_text(getattr(predictor, each.name))}" for each in fields)
    return f"{kind.__module__}.{kind.__qualname__}({values})"


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))})"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    return f"<{type(value).__qualname__}>"
