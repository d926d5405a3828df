"""`accel.calibrate`: what one model with one sampler needs, found out by recording and trying."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels.errors import AccelError
from ..kernels.predictors import PREDICTORS, Predictor
from ..kernels.predictors.recorded import same_form
from ..passes.pade.forecast import OWN, RECORDED, Forecast, Point, Profile
from ..passes.pade.schedule import FEWEST, GROWTH, Planned, place
from .export.engine import Engine
from .report import owners_of
from .runtime.fingerprint import digests
from .runtime.forecasts import Trial, trying
from .runtime.sampling import PadeGraph, graphs_of

__all__ = ["attempting", "calibrate"]

KEPT = 2**14  # values of each sample's residual that are recorded
TRIED = 0.4  # the share of computed steps that variants are compared at
LEAST, MOST, POINTS = 0.25, 0.7, 10  # shares of computed steps on the curve, and how many of them
# What is compared; see `place` and the option `correction`.
FITTED = ("pade-damped", "pade", "damped")  # predictors of the form that recorded slopes have
GROWTHS, CORRECTIONS = (1.0, 1.25, 1.55), (0.5, 1.0)
LITTLE = 0.2  # decibels by which a way has to be better at least
ALONE = 1.0  # the same in decibels, of one sample
SAME = 0.01  # relative difference between residuals of the same step
BEST = 200.0  # decibels that are shown for no difference at all


@dataclass(frozen=True)
class _Way:
    """One way to sample: see `place` and `Point`."""

    correction: float
    growth: float = GROWTH
    together: int = 1
    predictor: str = OWN


@dataclass
class _Recording:
    """What is seen of one run: for each step the times and, of each call, its residuals' values.

    kept: whether values of all steps are, or of the first one only. calls: how many there were.
    broken: the number of the first call with values that are not finite; 0 for none.
    """

    graphs: set[PadeGraph] = field(default_factory=set)
    shapes: tuple[tuple[int, ...], ...] = ()
    steps: dict[int, list[list[Tensor]]] = field(default_factory=dict)
    times: dict[int, float] = field(default_factory=dict)
    kept: bool = True
    calls: int = 0
    broken: int = 0

    def see(self, graph: PadeGraph, step: int, now: Tensor, residuals: Sequence[Tensor]) -> None:
        self.graphs.add(graph)
        self.times.setdefault(step, float(now[0]))
        self.shapes = tuple(tuple(each.shape[1:]) for each in residuals)
        calls = self.steps.setdefault(step, [])
        self.calls += 1
        if self.kept or step == 0:
            calls.append([_excerpt(each) for each in residuals])
            if not self.broken and not all(torch.isfinite(each).all() for each in calls[-1]):
                self.broken = self.calls


class _Calibration:
    """One calibration under way. whole: the result of each seed's run in full, and first: what its
    first step's residuals were. costs: computed steps and seconds of each other run."""

    def __init__(
        self,
        owners: frozenset[int],
        run: Callable[[int], Any],
        data_range: float | None,
        progress: Callable[[float, str], None],
    ) -> None:
        self.owners, self.run, self.data_range, self.progress = owners, run, data_range, progress
        self.steps = 0
        self.whole: dict[int, Tensor] = {}
        self.first: dict[int, list[list[Tensor]]] = {}
        self.costs: list[tuple[int, float]] = []

    def record(self, seed: int) -> _Recording:
        """A run in full."""
        recording = _Recording()
        result = self._go(seed, None, recording)
        self._check(recording, result, seed)
        self.steps = self.steps or len(recording.steps)
        if len(recording.steps) != self.steps:
            raise AccelError(
                f"run({seed}) has {len(recording.steps)} steps and the one before had "
                f"{self.steps}; all have to have as many"
            )
        self.whole[seed], self.first[seed] = result, recording.steps[0]
        return recording

    def attempt(self, seed: int, forecast: Forecast, text: str) -> Tensor:
        """A run by a forecast: decibels of each sample to the full one, `[batch]`."""
        assert isinstance(forecast.schedule, Planned)
        self.progress(self.spent, text)
        recording = _Recording(kept=False)
        started = time.perf_counter()
        result = self._go(seed, forecast, recording)
        first = recording.steps.get(0, [])
        if not first or any(
            _apart(*each) > SAME for calls in zip(first, self.first[seed], strict=True)
            for each in zip(*calls, strict=True)
        ):  # fmt: skip
            raise AccelError(
                f"run({seed}) began in two different ways: each call with one seed has to begin "
                "from the same noise, with the same conditions and weights (by a torch.Generator "
                "of its own, made with that seed)"
            )
        planned = len(forecast.schedule.planned)
        self.costs.append((planned, time.perf_counter() - started))
        return self._decibels(result, self.whole[seed])

    @property
    def spent(self) -> float:
        """What was computed beside the runs in full, in full runs."""
        return sum(computed / self.steps for computed, _ in self.costs)

    def share(self, full: float) -> float:
        """What a predicted step costs, in computed ones. full: seconds of a run in full."""
        each = full / self.steps
        rest = sum(seconds - computed * each for computed, seconds in self.costs)
        count = sum(self.steps - computed for computed, _ in self.costs)
        return min(max(rest / (count * each), 0.0), 1.0) if count else 0.0

    def _go(self, seed: int, forecast: Forecast | None, recording: _Recording) -> Tensor:
        with trying(Trial(self.owners, forecast, self.steps or None, recording.see)):
            result = self.run(seed)
        if not isinstance(result, Tensor):
            result = torch.as_tensor(result)
        if not result.dim() or not result.numel():
            raise AccelError(f"run({seed}) has to return samples [batch, ...]; it returned none")
        # A copy: the model's own buffers may be what it returns.
        return result.detach().to("cpu", torch.float64, copy=True)

    def _decibels(self, result: Tensor, full: Tensor) -> Tensor:
        """PSNR of each sample, `[batch]`."""
        if result.shape != full.shape:
            raise AccelError(
                f"one run returned samples {list(result.shape)}, another {list(full.shape)}"
            )
        peak = self.data_range or float(full.max() - full.min())
        error = (result - full).square().flatten(1).mean(1)
        return (10 * torch.log10(peak**2 / error)).nan_to_num(posinf=BEST).clamp(max=BEST)

    def _check(self, recording: _Recording, result: Tensor, seed: int) -> None:
        if len(recording.graphs) != 1:
            raise AccelError(
                f"run({seed}) went through {len(recording.graphs)} graphs with a skip branch; "
                + ("a run goes through one, at one size"
                   if recording.graphs else "is this the compiled model that it calls, and does "
                   "accel.explain find a block stack in it?")
            )  # fmt: skip
        if recording.broken:
            raise AccelError(
                f"run({seed}) has NaN or Inf in its call {recording.broken} of the model: nothing "
                "can be learnt from it"
            )
        if not torch.isfinite(result).all() or float(result.max() - result.min()) == 0:
            raise AccelError(
                f"run({seed}) returned samples with NaN or Inf, or with one value throughout: they "
                "can't be compared"
            )
        calls = [len(each) for each in recording.steps.values()]
        if len(set(calls)) > 1 or sorted(recording.steps) != list(range(len(calls))):
            raise AccelError(
                f"run({seed}) is no single run whose steps follow each other: calls by step "
                f"{dict(sorted(zip(recording.steps, calls, strict=True)))}. Where the sampler adds "
                "noise, or changes samples between steps, call the model in "
                "`with accel.trajectory(...)`, or by accel.accelerate's pipeline"
            )
        if len(calls) <= FEWEST:
            raise AccelError(
                f"run({seed}) has {len(calls)} steps: up to {FEWEST} all are computed, and there "
                "is nothing to gain"
            )


@contextlib.contextmanager
def attempting(compiled: Any, forecast: Forecast | None, steps: int) -> Iterator[None]:
    """Have a compiled model's calls here follow a forecast, whatever its options say.

    forecast: None for computing everything. steps: how many a run has.
    """

    with trying(Trial(owners_of(compiled), forecast, steps)):
        yield


def calibrate(
    compiled: Any,
    run: Callable[[int], Any],
    *,
    output: str | Path | None = None,
    seeds: tuple[int, int] = (0, 1),
    data_range: float | None = None,
    progress: Callable[[float, str], None] = lambda share, text: None,
) -> Profile:
    """Find out what a model with its sampler needs: a curve of fidelity over speed (ours).

    Records a run in full, compares ways to sample on its noise, and measures the chosen one's
    fidelity for ten numbers of computed steps on other noise. That computes as many steps as about
    twelve full runs; predicting the others comes on top.
    Then `options={"pade": {"profile": profile, "min_psnr": 40}}` (or `"speed": 2.5`) compiles the
    model so that it keeps to what was measured.

    compiled: the model that torch.compile returned (a pipeline's `transformer` after
    `accel.accelerate`). run: samples with it, from noise of the seed that it is given, and returns
    the samples `[batch, ...]`; the more of them, and the more different, the surer the figures.
    The same seed has to give the same samples. output: a file to write the profile to.
    data_range: between the least and the largest value that a sample can have, for PSNR; None takes
    it from the full run. progress: is called with the share that is done, and what comes next.

    Raises AccelError where runs can't be compared: of different lengths, not repeatable, with NaN
    or Inf, with so few steps that there is nothing to gain, or whose steps are not known for steps
    of one run.
    """
    one, other = seeds
    if one == other:
        raise AccelError(f"seeds are {seeds}; the second is to check on other noise than the first")
    if data_range is not None and not data_range > 0:
        raise AccelError(f"data_range is {data_range}; it has to be above 0")
    if isinstance(compiled, Engine):
        raise AccelError(
            "an engine takes its profile with it: calibrate the compiled model, and export it with "
            'options={"pade": {"profile": ...}}'
        )
    owners = owners_of(compiled)
    total = 12.0  # full runs that it takes
    task = _Calibration(owners, run, data_range, lambda spent, text: progress(
        min((2 + spent) / total, 1.0), text))  # fmt: skip
    progress(0.0, "a run in full, to be recorded")
    recording = task.record(one)
    progress(1 / total, "other noise in full")
    started = time.perf_counter()  # the first call may have compiled the model
    task.record(other)
    full = time.perf_counter() - started
    (graph,) = recording.graphs
    products = _products(recording)
    times = tuple(recording.times[step] for step in range(task.steps))
    held = [ref() for each, model in graphs_of(owners) if each is graph for ref in model.held]
    weights = digests([each for each in held if isinstance(each, Tensor)])
    everything = Point(tuple(range(task.steps)), OWN, 0.0, BEST, None)
    known = Profile(tuple(weights), recording.shapes, times, products, 0.0, (everything,))
    base = graph.state.predictor

    def attempt(way: _Way, computed: int, seed: int, text: str) -> tuple[Point, Tensor]:
        placed = place(task.steps, computed, way.growth, way.together)
        point = Point(placed, way.predictor, way.correction, 0.0, None)
        found = task.attempt(seed, known.forecast(point, base), text)
        return replace(point, psnr=float(found.mean()), error=_error(found)), found

    compared = round(TRIED * task.steps)
    way = _best_way(
        lambda way: attempt(way, compared, one, f"ways to compute {compared} steps")[1],
        _Way(graph.options.correction),
        _alternatives(base),
    )
    least, most = math.ceil(LEAST * task.steps), math.floor(MOST * task.steps)
    numbers = sorted({round(least + (most - least) * k / (POINTS - 1)) for k in range(POINTS)})
    found = [
        attempt(way, each, other, f"{each} of {task.steps} steps computed")[0] for each in numbers
    ]
    better = [
        each for index, each in enumerate(found)
        if all(each.psnr > before.psnr for before in found[:index])
    ]  # fmt: skip
    profile = replace(known, share=task.share(full), points=tuple(better))
    if output is not None:
        profile.save(output)
    progress(1.0, "done")
    return profile


def _apart(one: Tensor, other: Tensor) -> float:
    """The relative L2 difference; all of it where sizes differ."""
    if one.shape != other.shape:
        return 1.0
    return float((one - other).norm() / other.norm().clamp(min=1e-30))


def _error(found: Tensor) -> float | None:
    """The standard error of a mean; None for one value."""
    return float(found.std() / math.sqrt(len(found))) if len(found) > 1 else None


def _better(found: Tensor, before: Tensor) -> bool:
    """Whether samples' decibels gain by more than what chance makes of so few."""
    gain = found - before
    error = _error(gain)
    return float(gain.mean()) > (ALONE if error is None else max(error, LITTLE))


def _alternatives(base: Predictor) -> list[str]:
    """Predictors that can stand in for the one that a graph was compiled with."""
    others = [name for name in FITTED if PREDICTORS[name] != base]
    return [RECORDED, *others] if same_form(base) else []


def _best_way(attempt: Callable[[_Way], Tensor], usual: _Way, others: Sequence[str]) -> _Way:
    """The way that does best, all on the same noise; the usual one where chance may have
    made the difference. others: predictors that fit the compiled graph, besides its own."""
    known = attempt(usual)
    best, most = usual, known

    def compare(ways: Sequence[_Way]) -> None:
        nonlocal best, most
        for way in ways:
            if way == usual:
                continue
            found = attempt(way)
            if found.mean() > most.mean():
                best, most = way, found

    compare([
        replace(usual, growth=growth, predictor=each)
        for growth in GROWTHS for each in (OWN, *others[:1])
    ])  # fmt: skip
    compare([replace(best, growth=growth, together=2) for growth in GROWTHS[1:]])
    compare([replace(best, predictor=each) for each in others[1:]])
    if usual.correction:
        compare([replace(best, correction=correction) for correction in CORRECTIONS])
    return best if _better(most, known) else usual


def _excerpt(residual: Tensor) -> Tensor:
    """Some values of each sample, all over it, the same for each such residual: `[batch, some]`."""
    flat = residual.detach().flatten(1)
    if flat.shape[1] > KEPT:
        draw = torch.Generator().manual_seed(0)
        chosen = torch.randperm(flat.shape[1], generator=draw)[:KEPT]
        flat = flat[:, chosen.to(flat.device)]
    return flat.float().cpu().clone()


def _products(recording: _Recording) -> tuple[tuple[tuple[float, ...], ...], ...]:
    """Of each stream the inner products of its residuals, over all samples and calls."""
    calls = [recording.steps[step] for step in range(len(recording.steps))]
    found = []
    for stream in range(len(calls[0][0])):
        total = torch.zeros(len(calls), len(calls), dtype=torch.float64)
        for call in range(len(calls[0])):
            values = torch.stack([each[call][stream].flatten() for each in calls]).double()
            total += values @ values.T
        found.append(tuple(tuple(row) for row in total.tolist()))
    return tuple(found)
