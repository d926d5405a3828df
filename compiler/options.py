"""Options of the backend: one for each pass, made from `PASSES`, and a few of the compiler's own.

Everything is checked when it is set, before anything is compiled.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..kernels.errors import OptionError
from ..kernels.predictors import predictor_name
from ..passes import PASSES, Pass
from ..passes.options import built, check_known
from .lowering.table import LOWERINGS

__all__ = ["Options", "parse_options"]

KINDS: dict[str, type[Pass]] = {kind.name: kind for kind in PASSES}
OWN = ("lowering", "verify", "dump")
P = TypeVar("P", bound=Pass)


class Options:
    """Options of `torch.compile(model, backend="accel", options=...)`. Not to be changed.

    Each pass by its name: True, False, a dict of the pass's own options, or the pass.
    lowering: what compiles the rewritten graph: "inductor"; "eager" (debugging) runs it as it is;
        "tensorrt" hands its parts to torch_tensorrt and keeps the choice between them in torch.
    verify: check every rewritten graph in depth (fake execution) rather than in form only, and
        raise where a pass fails.
    dump: a directory that each graph is written to before and after every pass; None for none.

    passes: those that are on, by name, in their order.
    """

    passes: Mapping[str, Pass]

    def __init__(
        self, *, lowering: str = "inductor", verify: bool = False,
        dump: str | Path | None = None, **passes: Any,
    ) -> None:  # fmt: skip
        for name in passes:
            check_known(name, [*KINDS, *OWN], "options")
        found = {}
        for name, kind in KINDS.items():
            each = _configured(kind, passes.get(name, kind.default))
            if each is not None:
                found[name] = each
        if lowering not in LOWERINGS:
            raise OptionError(f"lowering {lowering!r} is none of {', '.join(LOWERINGS)}")
        if not isinstance(verify, bool):
            raise OptionError(f"verify is {verify!r}; it has to be True or False")
        if not isinstance(dump, (str, Path, type(None))):
            raise OptionError(f"dump is {dump!r}; it has to be a directory's path or None")
        self.passes = found
        self.lowering = lowering
        self.verify = verify
        self.dump = None if dump is None else Path(dump)

    def __getattr__(self, name: str) -> Any:
        """A pass by its name; None where it is off."""
        if name in KINDS:
            return self.passes.get(name)
        raise AttributeError(f"options have no {name!r}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Options) and vars(self) == vars(other)

    def __repr__(self) -> str:
        each = ", ".join(f"{name}={self.passes.get(name)!r}" for name in KINDS)
        return f"Options({each}, lowering={self.lowering!r})"

    def of(self, kind: type[P]) -> P | None:
        """The pass of a class; None where it is off."""
        found = self.passes.get(kind.name)
        return found if isinstance(found, kind) else None

    def without(self, *names: str) -> Options:
        """The same with these passes turned off."""
        kept: dict[str, Any] = {name: self.passes.get(name, False) for name in KINDS}
        kept |= dict.fromkeys(names, False)
        return Options(lowering=self.lowering, verify=self.verify, dump=self.dump, **kept)

    def plain(self) -> dict[str, Any]:
        """As JSON holds it, and `parse_options` reads it."""
        found: dict[str, Any] = {"lowering": self.lowering, "verify": self.verify}
        for name in KINDS:
            each = self.passes.get(name)
            found[name] = False if each is None else _plain(each)
        plain: dict[str, Any] = json.loads(json.dumps(found, default=_plain))
        return plain


def _configured(kind: type[Pass], value: Any) -> Pass | None:
    if isinstance(value, kind):
        return value
    if isinstance(value, Mapping):
        return built(kind, value, kind.name)
    if value is True or value is False:
        return kind() if value else None
    raise OptionError(f"{kind.name} is {value!r}; it has to be True, False or a dict")


def _plain(value: Any) -> Any:
    """The fields of a dataclass of options by name; a predictor by its own name."""
    if not dataclasses.is_dataclass(value):
        return str(value)
    found = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    if "predictor" in found:
        found["predictor"] = predictor_name(found["predictor"])
    return found


def parse_options(options: Options | Mapping[str, Any] | None) -> Options:
    """Validated options. Raises OptionError with what was seen and what is known."""
    if isinstance(options, Options):
        return options
    if not isinstance(options or {}, Mapping):
        raise OptionError(f"options is {options!r}; it has to be a dict")
    for name in options or {}:
        check_known(name, [*KINDS, *OWN], "options")
    return Options(**(options or {}))
