"""The options of the backend, validated before anything is compiled."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..kernels.errors import OptionError
from ..kernels.omnisparse import Choice
from ..kernels.predictors import Predictor
from ..passes.pade.gate import Gate
from ..passes.pade.schedule import PRESETS, Schedule, parse_schedule
from ..passes.pade.trial import accepted

__all__ = ["CodebookOptions", "OmniSparseOptions", "Options", "PadeOptions", "parse_options"]

LOWERINGS = ("inductor", "eager", "tensorrt")
Config = TypeVar("Config")


@dataclass(frozen=True)
class PadeOptions:
    """Options of the Padé pass.

    preset: "quality", "balanced" or "fast": about 10, 8 and 6 computed steps of 20. For the
        schedule "auto" only; None means "balanced" there.
    predictor: a name from `accel.kernels.predictors.PREDICTORS`, or an object that follows
        `accel.kernels.predictors.Predictor`. An object is tried on small tensors first.
    schedule: "auto", "full" (always compute), {"interval": N, "warmup": W}, or a list of the
        steps to compute, counted from 0.
    gate: a further condition for skipping, judged after each computed step; None for none.
    max_error: a step is computed, whatever the schedule, where the predictor would have missed
        the last computed residual by more than this (relative L2, worst sample of the batch).
    max_runs: sampling runs whose state is kept at a time; the longest unused goes first.
    """

    preset: str | None = None
    predictor: str | Predictor = "pade"
    schedule: str | Mapping[str, int] | Sequence[int] = "auto"
    gate: Gate | Mapping[str, Any] | None = None
    max_error: float = 1.0
    max_runs: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "predictor", accepted(self.predictor))
        if self.preset is not None and self.preset not in PRESETS:
            raise OptionError(f"unknown preset {self.preset!r}; known: {', '.join(PRESETS)}")
        if self.preset is not None and self.schedule != "auto":
            raise OptionError(
                f"preset {self.preset!r} and schedule {self.schedule!r} contradict each other: a "
                'preset says how many steps schedule "auto" computes. Drop one of the two'
            )
        if not isinstance(self.gate, (Gate, type(None))):
            object.__setattr__(self, "gate", _build(Gate, self.gate, "pade.gate"))
        if not self.max_error > 0:
            raise OptionError(f"max_error is {self.max_error}; it has to be above 0")
        if self.max_runs < 1:
            raise OptionError(f"max_runs is {self.max_runs}; it has to be at least 1")
        self.plan()  # raises on a malformed schedule

    @property
    def stability_gate(self) -> Gate | None:
        """The gate as an object; a dict has become one by now."""
        return self.gate if isinstance(self.gate, Gate) else None

    def plan(self) -> Schedule:
        """The schedule as an object."""
        return parse_schedule(self.schedule, self.preset or "balanced")


@dataclass(frozen=True)
class CodebookOptions:
    """Options of the codebook pass: how many bytes its tables may take together."""

    table_bytes: int = 2**28

    def __post_init__(self) -> None:
        if self.table_bytes < 1:
            raise OptionError(f"table_bytes is {self.table_bytes}; it has to be above 0")


@dataclass(frozen=True)
class OmniSparseOptions(Choice):
    """Options of the OmniSparse pass: those of a selection, and the fewest keys that it is for."""

    minimum: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.minimum < 0:
            raise OptionError(f"minimum is {self.minimum}; it can't be negative")


@dataclass(frozen=True)
class Options:
    """Options of `torch.compile(model, backend="accel", options=...)`.

    pade: True, False, or the pass's own options. True by default: it applies to inference graphs
        with a block stack and a timestep.
    omnisparse: True, False, or the pass's own options. False by default: attention stays exact.
    codebook: True, False, or the pass's own options. False by default: its tables take memory and
        have to be computed again whenever a weight changes.
    outline: compile equal blocks once.
    lowering: what compiles the rewritten graph: "inductor"; "eager" (debugging) runs it as it is;
        "tensorrt" hands its parts to torch_tensorrt and keeps the choice between them in torch.
    verify: check every rewritten graph in depth (fake execution) rather than in form only.
    """

    pade: PadeOptions | Mapping[str, Any] | bool = True
    omnisparse: OmniSparseOptions | Mapping[str, Any] | bool = False
    codebook: CodebookOptions | Mapping[str, Any] | bool = False
    outline: bool = True
    lowering: str = "inductor"
    verify: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.pade, Mapping):
            object.__setattr__(self, "pade", _build(PadeOptions, self.pade, "pade"))
        if not isinstance(self.pade, (PadeOptions, bool)):
            raise OptionError(f"pade is {self.pade!r}; it has to be True, False or a dict")
        if isinstance(self.omnisparse, Mapping):
            built = _build(OmniSparseOptions, self.omnisparse, "omnisparse")
            object.__setattr__(self, "omnisparse", built)
        if not isinstance(self.omnisparse, (OmniSparseOptions, bool)):
            raise OptionError(
                f"omnisparse is {self.omnisparse!r}; it has to be True, False or a dict"
            )
        if isinstance(self.codebook, Mapping):
            object.__setattr__(self, "codebook", _build(CodebookOptions, self.codebook, "codebook"))
        if not isinstance(self.codebook, (CodebookOptions, bool)):
            raise OptionError(f"codebook is {self.codebook!r}; it has to be True, False or a dict")
        for name in ("outline", "verify"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} is {getattr(self, name)!r}; it has to be True or False")
        if self.lowering not in LOWERINGS:
            raise OptionError(f"lowering {self.lowering!r} is none of {', '.join(LOWERINGS)}")

    @property
    def pade_options(self) -> PadeOptions | None:
        """The Padé pass's options, or None where it is off."""
        if isinstance(self.pade, PadeOptions):
            return self.pade
        return PadeOptions() if self.pade else None

    @property
    def omnisparse_options(self) -> OmniSparseOptions | None:
        """The OmniSparse pass's options, or None where it is off."""
        if isinstance(self.omnisparse, OmniSparseOptions):
            return self.omnisparse
        return OmniSparseOptions() if self.omnisparse else None

    @property
    def codebook_options(self) -> CodebookOptions | None:
        """The codebook pass's options, or None where it is off."""
        if isinstance(self.codebook, CodebookOptions):
            return self.codebook
        return CodebookOptions() if self.codebook else None


def _build(kind: type[Config], values: Any, where: str) -> Config:
    """A config dataclass from a mapping; an unknown key is an error naming the nearest one."""
    if not isinstance(values, Mapping):
        raise OptionError(f"{where} is {values!r}; it has to be a dict")
    # A TypeVar can't be bound to "any dataclass", so mypy doubts that this one is.
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
            raise OptionError(
                f"unknown option {key!r} in {where}; did you mean {near[0]!r}? "
                f"(known: {', '.join(known)})"
            )
    return kind(**values)


def parse_options(options: Options | Mapping[str, Any] | None) -> Options:
    """Validated options. Raises OptionError with what was seen and what is known."""
    if isinstance(options, Options):
        return options
    return _build(Options, options or {}, "options")
