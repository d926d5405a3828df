"""The Padé pass: its options, and what it does with a graph."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ...kernels.errors import OptionError
from ...kernels.predictors import Predictor, resolve
from ...kernels.predictors.recorded import same_form
from ..base import Feature, Pass, PassResult, Program, Reason, Skip
from ..graph.nodes import hint, results_of, value_of
from ..options import built
from .clock import find_clock
from .forecast import OWN, Forecast, Point, Profile
from .gate import Gate
from .region import find_region
from .rewrite import wrap_in_branch
from .schedule import PRESETS, Full, Schedule, parse_schedule
from .trial import accepted

__all__ = ["PadePass"]


@dataclass(frozen=True)
class PadePass(Pass):
    """Wrap the block stack in `torch.cond(compute, blocks, predict)`.

    preset: "quality", "balanced" or "fast": about 10, 8 and 6 computed steps of 20. For the
        schedule "auto" only; None means "balanced" there.
    predictor: a name from `accel.kernels.predictors.PREDICTORS`, or an object that follows
        `accel.kernels.predictors.Predictor`. An object is tried on small tensors first.
    schedule: "auto", "full" (always compute), {"interval": N, "warmup": W}, or a list of the
        steps to compute, counted from 0.
    gate: a further condition for skipping, judged after each computed step; None for none.
    correction: the share of what predicted steps have missed, as it shows at the next computed one,
        that this one's answer gives back; 0 for none, 1 for all. It falls to none towards the end.
    profile: what `accel.calibrate` found out about the model, or the file of it. Its points say
        which steps are computed and how the others are predicted; the preset says how many, unless
        one of the next two does. mismatch: what happens where it is of other weights, sizes or
        another sampler: "warn" goes on without it, "raise" raises OptionError.
    min_psnr: decibels to the full run that the profile's fastest point has to keep; where none
        does, every step is computed.
    speed: how much faster than computing every step; of the points that are, the best one.
    max_error: a step is computed, whatever the schedule, where the predictor would have missed
        the last computed residual by more than this (relative L2, worst sample of the batch).
    max_runs: calls from which a run may go on whose state is kept at a time; guidance in two calls
        has two. The longest unused goes first.
    max_state_bytes: the most that all state may take; what was not used for longest is dropped, and
        its run's next step computed. None: a twentieth of the device's memory.
    """

    name: ClassVar[str] = "pade"
    summary: ClassVar[str] = "wraps the block stack in `torch.cond(compute, blocks, predict)`"
    applies: ClassVar[str] = "inference graphs with a block stack and a timestep input"
    keeps: ClassVar[str] = "the last three residuals of each sampling run, and two like its output"
    default: ClassVar[bool] = True
    features: ClassVar[frozenset[Feature]] = frozenset({Feature.BRANCH, Feature.STATE})

    preset: str | None = None
    predictor: str | Predictor = "pade-damped"
    schedule: str | Mapping[str, int] | Sequence[int] = "auto"
    gate: Gate | Mapping[str, Any] | None = None
    correction: float = 0.75
    profile: Profile | str | Path | Mapping[str, Any] | None = None
    min_psnr: float | None = None
    speed: float | None = None
    mismatch: str = "warn"
    max_error: float = 1.0
    max_runs: int = 8
    max_state_bytes: int | None = None

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
            object.__setattr__(self, "gate", built(Gate, self.gate, "pade.gate"))
        if not 0 <= self.correction <= 1:
            raise OptionError(f"correction is {self.correction}; it has to be from 0 to 1")
        if not self.max_error > 0:
            raise OptionError(f"max_error is {self.max_error}; it has to be above 0")
        if self.max_state_bytes is not None and self.max_state_bytes < 0:
            raise OptionError(f"max_state_bytes is {self.max_state_bytes}; it has to be at least 0")
        if self.max_runs < 1:
            raise OptionError(f"max_runs is {self.max_runs}; it has to be at least 1")
        self.plan()  # raises on a malformed schedule
        if isinstance(self.profile, (str, Path)):
            object.__setattr__(self, "profile", Profile.read(self.profile))
        elif not isinstance(self.profile, (Profile, type(None))):
            object.__setattr__(self, "profile", Profile.of(self.profile))
        self._check_profile()

    def _check_profile(self) -> None:
        asked = {"min_psnr": self.min_psnr, "speed": self.speed}
        given = [name for name, value in asked.items() if value is not None]
        if self.mismatch not in ("warn", "raise"):
            raise OptionError(f"mismatch is {self.mismatch!r}; it has to be 'warn' or 'raise'")
        if given and self.profile is None:
            raise OptionError(
                f"{given[0]} needs a profile of the model, which says what it takes: make one with "
                "accel.calibrate and give it as profile"
            )
        for name in given:
            value = asked[name]
            if not isinstance(value, (int, float)) or not value > 0:
                raise OptionError(f"{name} is {value!r}; it has to be above 0")
        if len(given) == 2 or (given and self.preset is not None):
            other = given[1] if len(given) == 2 else "preset"
            raise OptionError(f"{given[0]} and {other} contradict each other; drop one of the two")
        if self.profile is not None and self.schedule != "auto":
            raise OptionError(
                f"a profile and schedule {self.schedule!r} contradict each other: the profile says "
                "which steps are computed. Drop one of the two"
            )
        point = self.point()  # raises where the profile has none that is fast enough
        stands_in = point is not None and point.predictor != OWN
        if stands_in and not same_form(resolve(self.predictor)):
            raise OptionError(
                f"the profile's predictor can't stand in for {self.predictor!r}, which reads "
                "something else: calibrate with that predictor, or use the default one"
            )

    def forecast(self, predictor: Predictor) -> Forecast:
        """What the options say of a run: by the profile, where there is one. predictor: that of the
        compiled graph."""
        if not isinstance(self.profile, Profile):
            return Forecast(self.plan(), (predictor,), self.correction)
        point = self.point()
        if point is None:
            return Forecast(Full(), (predictor,), self.correction)
        return self.profile.forecast(point, predictor)

    def point(self) -> Point | None:
        """The profile's point that the options ask for; None for computing every step."""
        if not isinstance(self.profile, Profile):
            return None
        if self.min_psnr is not None:
            return self.profile.fewest(self.min_psnr)
        if self.speed is not None:
            found = self.profile.fastest(self.speed)
            if found is None:
                fastest = max(map(self.profile.speed, self.profile.points))
                raise OptionError(
                    f"speed is {self.speed}; by its profile the model gets at most {fastest:.2f} "
                    "times faster"
                )
            return found
        return self.profile.nearest(PRESETS[self.preset or "balanced"] * self.profile.steps)

    @property
    def stability_gate(self) -> Gate | None:
        """The gate as an object; a dict has become one by now."""
        return self.gate if isinstance(self.gate, Gate) else None

    def plan(self) -> Schedule:
        """The schedule as an object."""
        return parse_schedule(self.schedule, self.preset or "balanced")

    def run(self, program: Program) -> tuple[Program, PassResult]:
        """Declines, with reasons, where no sound region exists."""
        if program.training:
            detail = "parameters or inputs need gradients; skipping steps is for inference"
            return program, PassResult(self.name, skipped=(Skip(Reason.TRAINING, detail),))
        region, refused = find_region(program.module.graph, program.memory)
        if region is None:
            return program, PassResult(self.name, skipped=tuple(refused))
        clock = find_clock(program.module.graph, region)
        if not clock.times:
            detail = (
                "no input feeds a sinusoidal embedding. A timestep given as a Python number is a "
                "constant of the graph: pass a tensor"
            )
            skips = (*refused, Skip(Reason.NO_TIMESTEP, detail))
            return program, PassResult(self.name, skipped=skips)
        state, module = wrap_in_branch(program, region, clock, resolve(self.predictor))
        stacks = ", ".join(f"{stack.parent} ({len(stack.blocks)})" for stack in region.stacks)
        # What is given back is reckoned from two tensors like each answer, one of them float32.
        results = results_of(program.module.graph)
        answers = [value_of(results[index]) for index in dict.fromkeys(clock.answers)]
        owed = sum(math.prod(map(hint, each.shape)) * (each.itemsize + 4) for each in answers)
        details = {
            "blocks": region.blocks,
            "streams": len(region.streams),
            "nodes_skipped": len(region.nodes),
            "state_bytes": state.bytes() + (owed if self.correction else 0),
            "pairing": "additive" if all(s.additive for s in region.streams) else "same shape",
        }
        result = PassResult(self.name, (stacks,), tuple(refused), details)
        return dataclasses.replace(program, module=module, added=(*program.added, state)), result
