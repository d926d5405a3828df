"""Which forecast a call of a model follows: its options', a profile's, or one that is tried out."""

from __future__ import annotations

import contextlib
import contextvars
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...kernels.errors import OptionError
from ...kernels.predictors import Predictor
from ...passes import PadePass
from ...passes.pade.forecast import Forecast, Profile
from ...passes.pade.rules import Carried
from ...passes.pade.schedule import Full
from .fingerprint import digests
from .kept import Model

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
        self,
        model: Model,
        carried: Carried,
        now: Tensor,
        depth: int,
        steps: int | None,
        before: str,
    ) -> tuple[Forecast, str]:
        """That of one call, and what of its run is not as recorded; empty where all is.

        depth: its step in the run; steps: how many that has, if known. before: what was not as
        recorded on the step before.
        """
        if self.profile is None:
            return self.default, ""
        why = model.misfit or before or self._strange(self.profile, carried, now, depth, steps)
        if not why:
            model.counters.calibrated_steps += 1
            return self.calibrated, ""
        if why not in model.counters.uncalibrated and not model.misfit:
            self._say(why)
        model.counters.uncalibrated[why] = model.counters.uncalibrated.get(why, 0) + 1
        return self.default, why

    def _strange(
        self, profile: Profile, carried: Carried, now: Tensor, depth: int, steps: int | None
    ) -> str:
        """What of a step's time is not as recorded; empty where all is."""
        if not carried.known or steps is None:
            return ""  # the step is computed, whatever the profile says
        apart = APART if steps == profile.steps else STEP / min(profile.steps, steps)
        if self._apart(profile, carried, now, depth, steps) <= apart:
            return ""
        return "its times fall otherwise than those of the recorded run: another sampler"

    def length(self, carried: Carried, now: Tensor, depth: int, steps: int | None) -> int | None:
        """How many steps a run has: the recorded one's where it is not known and begins like it."""
        profile = self.profile
        if steps is not None or profile is None or depth != 1 or not carried.known:
            return steps
        apart = self._apart(profile, carried, now, depth, profile.steps)
        return profile.steps if apart <= ALIKE else None

    @staticmethod
    def _apart(profile: Profile, carried: Carried, now: Tensor, depth: int, steps: int) -> float:
        """How far a step is from where it was recorded, seen from the newest computed one; as a
        share of all times."""
        scale = profile.steps / steps
        wanted = _at(profile.times, depth * scale) - _at(
            profile.times, (int(carried.last) - 1) * scale
        )
        whole = abs(profile.times[0] - profile.times[-1])
        return float((now - carried.times[0] - wanted).abs().max()) / whole

    def _say(self, why: str) -> None:
        what = f"the profile is not of this model: {why}"
        if self.options.mismatch == "raise":
            raise OptionError(f'{what}. Calibrate it, or say mismatch="warn" to go on without')
        warnings.warn(f"{what}; it is not applied", stacklevel=2)


def _at(times: Sequence[float], position: float) -> float:
    """The time at a place between steps, or as far behind them as the last ones are apart."""
    first = min(int(position), len(times) - 2)
    return times[first] + (position - first) * (times[first + 1] - times[first])
