"""How near forecasts stay to the full run, on five trained models of different kinds.

    python -m accel.examples.generators.judge rules FOLDER        # which rule would one choose
    python -m accel.examples.generators.judge calibration FOLDER  # what a calibration is worth

Everything goes through the back end, in closed loop, with Inductor left out (`lowering="eager"`):
it costs compilation and changes no more than rounding. PSNR is of pictures (values in [-1, 1]), the
mean over samples; each mean is over seeds that no choice has seen.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import PadeOptions, Profile, calibrate, trajectory
from ...compiler.calibration import attempting
from ...kernels.predictors import PREDICTORS, Predictor, resolve
from ...passes.pade.forecast import Forecast, Point
from ...passes.pade.schedule import Planned, place
from .. import records
from ..fashion import measure
from ..fashion import model as fashion
from . import GENERATORS

__all__ = ["MODELS", "Judged"]

MODELS = ("reference", *GENERATORS)
BUDGETS = ((20, 6), (20, 8), (20, 10), (30, 12), (50, 20))
TARGETS = (35, 40, 45)
GROWTHS = (1.25, 1.4, 1.55)
RULES = ("damped", "pade", "pade-damped")  # of one form: three residuals, two coefficients


class Judged:
    """One trained model, compiled by accel, and how it samples.

    batch: samples of a run. options: of the Padé pass.
    """

    def __init__(self, name: str, batch: int = 16, **options: Any) -> None:
        self.name, self.batch = name, batch
        how: dict[str, Any] = {"lowering": "eager", "pade": options}
        if name == "reference":
            self.kind, network = None, fashion.load()
            self.conditions = torch.arange(64) % fashion.NO_CLASS
            self.shape: tuple[int, ...] = (1, 28, 28)
            self.model: Any = torch.compile(network, backend="accel", options=how)
        else:
            self.kind = GENERATORS[name]
            self.network, self.conditions, _ = self.kind.load()
            self.shape = self.kind.shape
            self.model = torch.compile(self.network.transformer, backend="accel", options=how)

    @torch.no_grad()
    def sample(
        self, seed: int, steps: int = 20, batch: int = 0, guidance: float | None = None
    ) -> Tensor:
        """A run: pictures in [-1, 1]."""
        batch = batch or self.batch
        draw = torch.Generator().manual_seed(seed)
        noise = torch.randn(batch, *self.shape, generator=draw)
        told = self.conditions[(torch.arange(batch) + seed) % len(self.conditions)]
        if self.kind is None:
            scale = 2.0 if guidance is None else guidance
            with trajectory(self.model, steps=steps):
                *_, state = fashion.sample(self.model, noise, told, steps=steps, guidance=scale)
            return state.clamp(-1, 1)
        with trajectory(self.model, scheduler=self.kind.scheduler(steps)):
            *_, state = self.kind.sample(
                self.network, noise, told, steps=steps, transformer=self.model, guidance=guidance
            )
        return state

    def attempt(self, forecast: Forecast | None, seed: int, steps: int, **how: Any) -> Tensor:
        """A run that follows a forecast; None computes everything."""
        with attempting(self.model, forecast, steps):
            return self.sample(seed, steps, **how)


@dataclass(frozen=True)
class Row:
    """One rule at one place. growth, together: see `place`. psnr: dB, mean over samples."""

    model: str
    steps: int
    computed: int
    rule: str
    growth: float
    together: int
    correction: float
    seed: int
    psnr: float


def rules(names: Sequence[str], seeds: Sequence[int], batch: int) -> Iterator[list[Row]]:
    """Every rule at every placement of a family, on every model: the rows of each model."""
    for name in names:
        judged, rows = Judged(name, batch), []
        for (steps, computed), seed in ((b, s) for b in BUDGETS for s in seeds):
            full = judged.attempt(None, seed, steps)
            for rule, predictor in _candidates():
                for growth in GROWTHS:
                    for together in (1, 2):
                        plan = Planned(place(steps, computed, growth, together), steps)
                        got = judged.attempt(Forecast(plan, (predictor,), 0.75), seed, steps)
                        psnr = round(float(measure.psnr(got, full).mean()), 2)
                        rows.append(
                            Row(name, steps, computed, rule, growth, together, 0.75, seed, psnr)
                        )
            yield rows[-len(_candidates()) * len(GROWTHS) * 2 :]


def _candidates() -> list[tuple[str, Predictor]]:
    return [(name, PREDICTORS[name]) for name in RULES]


def left_out(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each model and budget: the rule and placement that is best on the mean of the other
    models, over all budgets, what it has here, and what the best one here has."""
    models = list(dict.fromkeys(row.model for row in rows))
    found: dict[tuple[Any, ...], dict[tuple[str, int, int], list[float]]] = {}
    for row in rows:
        key = row.rule, row.growth, row.together
        place_of = row.model, row.steps, row.computed
        found.setdefault(key, {}).setdefault(place_of, []).append(row.psnr)
    means = {
        key: {where: statistics.fmean(values) for where, values in each.items()}
        for key, each in found.items()
    }
    made = []
    for model in models:
        chosen = max(
            means,
            key=lambda key: statistics.fmean(
                value for where, value in means[key].items() if where[0] != model
            ),
        )
        for where in dict.fromkeys((row.model, row.steps, row.computed) for row in rows):
            if where[0] != model:
                continue
            best = max(means, key=lambda key: means[key][where])
            made.append({
                "model": model, "steps": where[1], "computed": where[2],
                "chosen on the others": _text(chosen), "psnr": round(means[chosen][where], 2),
                "best here": _text(best), "its psnr": round(means[best][where], 2),
            })  # fmt: skip
    return made


def _text(key: tuple[Any, ...]) -> str:
    return f"{key[0]}, growth {key[1]}, {key[2]} together"


@dataclass(frozen=True)
class Calibrated:
    """One model at one number of computed steps, on seeds that the calibration has not seen.

    promised: what the profile says. psnr, uncalibrated: measured, with it and with the default.
    """

    model: str
    steps: int
    computed: int
    what: str
    promised: float
    psnr: float
    uncalibrated: float


def calibration(
    names: Sequence[str], seeds: Sequence[int], batch: int, folder: Path
) -> Iterator[list[Calibrated]]:
    """Each model calibrated at 20 steps, then measured on other seeds, batches, guidance and
    numbers of steps."""
    for name in names:
        judged = Judged(name, batch)
        folder.mkdir(parents=True, exist_ok=True)
        profile = calibrate(
            judged.model, judged.sample, output=folder / f"{name}.json", data_range=2.0,
            seeds=(1000, 1001),
        )  # fmt: skip
        rows = []
        for computed in (6, 8, 10):
            point = profile.nearest(computed)
            for what, steps, how in _uses(judged):
                rows.append(_measured(judged, profile, point, seeds, what, steps, how))
        for target in TARGETS:
            kept = profile.fewest(target)
            if kept is not None:
                rows.append(_measured(judged, profile, kept, seeds, f"min_psnr {target}", 20, {}))
        yield rows


def _uses(judged: Judged) -> list[tuple[str, int, dict[str, Any]]]:
    usual = 2.0 if judged.kind is None else judged.kind.guidance
    return [
        ("as calibrated", 20, {}),
        ("batch 4", 20, {"batch": 4}),
        ("guidance 1.5 times as strong", 20, {"guidance": 1.5 * usual}),
        ("30 steps", 30, {}),
    ]


def _measured(
    judged: Judged, profile: Profile, point: Point, seeds: Sequence[int],
    what: str, steps: int, how: dict[str, Any],
) -> Calibrated:  # fmt: skip
    base = resolve(PadeOptions().predictor)
    with_it, without = list[float](), list[float]()
    for seed in seeds:
        full = judged.attempt(None, seed, steps, **how)
        forecast = profile.forecast(point, base)
        assert isinstance(forecast.schedule, Planned)
        computed = len(forecast.schedule.placed(steps))
        plain = Forecast(Planned(place(steps, computed), steps), (base,), 0.75)
        for forecasts, into in ((forecast, with_it), (plain, without)):
            got = judged.attempt(forecasts, seed, steps, **how)
            into.append(float(measure.psnr(got, full).mean()))
    return Calibrated(
        judged.name, steps, len(point.computed), what, round(point.psnr, 2),
        round(statistics.fmean(with_it), 2), round(statistics.fmean(without), 2),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("rules", "calibration"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    names, seeds = arguments.models.split(","), range(2000, 2000 + arguments.seeds)
    found: list[dict[str, Any]] = []
    parts: Iterator[Sequence[Any]] = (
        rules(names, seeds, arguments.batch)
        if arguments.part == "rules"
        else calibration(names, seeds, arguments.batch, arguments.folder / "profiles")
    )
    for rows in parts:
        found += map(asdict, rows)
        records.write(arguments.folder / f"{arguments.part}.csv", found)
        print(rows[-1], flush=True)
    if arguments.part == "rules" and len(names) > 1:
        chosen = left_out([Row(**each) for each in found])
        records.write(arguments.folder / "left_out.csv", chosen)


if __name__ == "__main__":
    main()
