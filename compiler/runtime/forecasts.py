"""Which forecast a call of a model follows: its options', a profile's, or one that is tried out."""

from __future__ import annotations

import contextlib
import contextvars
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ...kernels.errors import OptionError
from ...kernels.predictors import Predictor
from ...passes import PadePass
from ...passes.pade.forecast import Forecast, Profile
from ...passes.pade.schedule import Full
from .fingerprint import digests
from .kept import Course, Model
from .steps import Placed

__all__ = ["Forecasts", "Trial", "tried", "trying"]

# How far times may be from recorded ones, as a share of all: of a run of as many steps, and to take
# one for that whose length is not known yet. Of another length: in steps, as ends are spaced in
# several ways.
APART, ALIKE, STEP = 0.01, 1e-4, 0.5


@dataclass(frozen=True)
class Trial:
    """What a model's calls follow while something is tried out, and what is told of each.

    forecast: None for computing everything. steps: how many a run has, where its calls do not show
    it yet; None if that is not known. seen: called with the graph, the step in its run, its
    time, and the newest residual of each stream.
    """

    parameters: frozenset[int]
    forecast: Forecast | None
    steps: int | None
    seen: Callable[[Any, int, Tensor, Sequence[Tensor]], None] | None = None


_trial: contextvars.ContextVar[Trial | None] = contextvars.ContextVar("accel_trial", default=None)


@contextlib.contextmanager
def trying(trial: Trial) -> Iterator[None]:
    """Have the model's calls in this thread or task follow a trial."""
    token = _trial.set(trial)
    try:
        yield
    finally:
        _trial.reset(token)


def tried(parameter: int) -> Trial | None:
    """The trial of a model here, known by the id of one parameter."""
    trial = _trial.get()
    return trial if trial is not None and parameter in trial.parameters else None


class Forecasts:
    """The forecasts of one graph. predictor: the one that it was compiled with."""

    def __init__(self, options: PadePass, predictor: Predictor) -> None:
        self.options = options
        self.default = Forecast(options.plan(), (predictor,), options.correction)
        self.full = Forecast(Full(), (predictor,), options.correction)
        self.profile = options.profile if isinstance(options.profile, Profile) else None
        self.calibrated = options.forecast(predictor)

    def check(self, model: Model, weights: Sequence[Tensor], shapes: Sequence[Any]) -> None:
        """Find out whether the profile is of this model; waits for the weights' device where that
        is not known yet. Raises OptionError, or warns, where it is not.

        shapes: of the graph's predicted residuals, without the batch.
        """
        if self.profile is None or model.fit == (model.epoch, shapes):
            return
        model.misfit = self.profile.differs(digests(weights), shapes)
        if model.misfit:
            self._say(model.misfit)
        model.fit = model.epoch, shapes  # not where it was raised: the next call raises, too

    def of(
        self, model: Model, placed: Placed, now: Tensor, steps: int | None, trial: Trial | None
    ) -> tuple[Forecast, int | None, Course | None]:
        """That of one call, how many steps its run has (if that is known), and how that has gone.

        placed: its first sample, for all. now: the samples' times, `[batch]`. steps: as far as the
        run's calls show it.
        """
        if trial is not None:
            return trial.forecast or self.full, steps or trial.steps, None
        if self.profile is None:
            return self.default, steps, None
        depth, time = placed.step.depth, float(now[0])
        course = None if placed.before is None else placed.before.record.course
        course = course or Course(depth, time)
        if steps is None and depth == course.depth + 1:
            # A run that begins like the recorded one is taken to be as long.
            alike = self._apart(self.profile, course, depth, time, self.profile.steps) <= ALIKE
            steps = self.profile.steps if alike else None
        why = model.misfit or course.strange
        if not why and steps is not None:  # else the step is computed, whatever the profile says
            apart = APART if steps == self.profile.steps else STEP / min(self.profile.steps, steps)
            if self._apart(self.profile, course, depth, time, steps) > apart:
                why = "its times fall otherwise than those of the recorded run: another sampler"
        if not why:
            model.counters.calibrated_steps += 1
            return self.calibrated, steps, course
        if why not in model.counters.uncalibrated and not model.misfit:
            self._say(why)
        model.counters.uncalibrated[why] = model.counters.uncalibrated.get(why, 0) + 1
        return self.default, steps, replace(course, strange=why)

    @staticmethod
    def _apart(profile: Profile, course: Course, depth: int, time: float, steps: int) -> float:
        """How far a step is from where it was recorded, seen from the run's first one; as a share
        of all times."""
        scale = profile.steps / steps
        wanted = _at(profile.times, depth * scale) - _at(profile.times, course.depth * scale)
        return abs((time - course.time - wanted) / (profile.times[0] - profile.times[-1]))

    def _say(self, why: str) -> None:
        what = f"the profile is not of this model: {why}"
        if self.options.mismatch == "raise":
            raise OptionError(f'{what}. Calibrate it, or say mismatch="warn" to go on without')
        warnings.warn(f"{what}; it is not applied", stacklevel=2)


def _at(times: Sequence[float], position: float) -> float:
    """The time at a place between steps, or as far behind them as the last ones are apart."""
    first = min(int(position), len(times) - 2)
    return times[first] + (position - first) * (times[first + 1] - times[first])
