"""Predictors of a transformer stack's residual on skipped sampling steps, side by side."""

from ..errors import OptionError
from .base import MOMENTS, Predictor, Signals, judge, judged, moments
from .pade import Pade
from .polynomial import Reuse, Taylor
from .tc_pade import TCPadePaper, TCPadeRelease

__all__ = ["MOMENTS", "PREDICTORS", "Predictor", "Signals", "judge", "judged", "moments", "resolve"]

PREDICTORS: dict[str, Predictor] = {
    "pade": Pade(),
    "pade-channel": Pade(granularity="channel"),
    "pade-token": Pade(granularity="token"),
    "reuse": Reuse(),
    "linear": Taylor(order=1),
    "taylor-1": Taylor(order=1),
    "taylor-2": Taylor(order=2),
    "taylor-3": Taylor(order=3),
    "tc-pade-paper": TCPadePaper(newest_last=True),
    "tc-pade-paper-reversed": TCPadePaper(newest_last=False),
    "tc-pade-release": TCPadeRelease(),
}


def resolve(name: str) -> Predictor:
    """The predictor called `name`. Raises OptionError with the known names otherwise."""
    if name not in PREDICTORS:
        raise OptionError(f"unknown predictor {name!r}; known: {', '.join(PREDICTORS)}")
    return PREDICTORS[name]
