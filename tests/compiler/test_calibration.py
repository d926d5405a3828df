"""`accel.calibrate` and what its profiles do, on diffusers' DiT through the back end."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accel
import pytest
import torch
from accel import AccelError, OptionError, Profile
from accel.tests.models import dit, noise
from torch import Tensor, nn

STEPS = 12
LABELS = torch.tensor([1, 2])


def compiled(model: nn.Module, **pade: Any) -> Any:
    options = {"lowering": "eager", "pade": pade}
    return torch.compile(model, backend="accel", fullgraph=True, options=options)


def sampler(
    model: Any, steps: int = STEPS, batch: int = 2, size: int = 8, shift: float = 1.0
) -> Callable[[int], Tensor]:
    """Euler steps of a flow, from noise of a seed. shift: of its times."""

    @torch.no_grad()
    def run(seed: int) -> Tensor:
        state, labels = noise(batch, seed=seed, size=size), LABELS[:batch]
        even = torch.linspace(1, 0, steps + 1)
        times = (shift * even / (1 + (shift - 1) * even)).tolist()
        for now, after in itertools.pairwise(times):
            timestep = torch.full((batch,), now * 1000)
            output = model(state, timestep=timestep, class_labels=labels).sample
            state = state + (after - now) * output
        return state

    return run


def decibels(one: Tensor, other: Tensor) -> float:
    error = (one - other).double().square().flatten(1).mean(1)
    peak = float(other.max() - other.min())
    return float((10 * torch.log10(peak**2 / error)).mean())


@pytest.fixture(scope="module")
def known() -> tuple[nn.Module, Profile, list[int], list[float]]:
    """A model, its profile, the seeds that it was sampled from for it, and the progress told."""
    torch._dynamo.reset()
    model = dit()
    fast = compiled(model)
    run, seeds, told = sampler(fast), list[int](), list[float]()

    def noted(seed: int) -> Tensor:
        seeds.append(seed)
        return run(seed)

    profile = accel.calibrate(fast, noted, progress=lambda share, text: told.append(share))
    return model, profile, seeds, told


Known = tuple[nn.Module, Profile, list[int], list[float]]


def test_each_point_says_what_a_model_compiled_with_it_does(known: Known) -> None:
    """On the noise that the curve was measured on, to the digit."""
    model, profile, _, _ = known
    full, tried = sampler(model)(1), 0
    for point in profile.points:
        wanted = {"profile": profile, "min_psnr": point.psnr - (point.error or 0.0)}
        if accel.PadeOptions(**wanted).point() != point:
            continue  # a faster one keeps to that, too
        fast = compiled(model, **wanted)
        assert decibels(sampler(fast)(1), full) == pytest.approx(point.psnr, abs=0.01)
        stats = accel.stats(fast)
        assert stats.full_steps == len(point.computed)
        assert not stats.uncalibrated
        assert stats.calibrated_steps == STEPS
        tried += 1
        torch._dynamo.reset()
    assert tried >= 3


def test_a_curve_rises_and_takes_at_most_twelve_runs(known: Known) -> None:
    _, profile, seeds, told = known
    counts, qualities = zip(*((len(p.computed), p.psnr) for p in profile.points), strict=True)
    assert list(counts) == sorted(set(counts))
    assert list(qualities) == sorted(set(qualities))
    # Two in full; none of the others computes more than the share that it is measured at.
    assert seeds.count(0) == 1 + 12
    assert seeds[:2] == [0, 1]
    compared, curve = round(0.4 * STEPS), sum(range(math.ceil(STEPS / 4), STEPS * 7 // 10 + 1))
    assert 2 + (12 * compared + curve) / STEPS <= 12
    assert told == sorted(told)
    assert told[0] == 0
    assert told[-1] == 1


def test_the_dial(known: Known) -> None:
    """Decibels give the fastest point that keeps to them, a speed the best one that has it."""
    model, profile, _, _ = known
    options = accel.PadeOptions
    assert options(profile=profile, min_psnr=1).point() == profile.points[0]
    assert options(profile=profile, min_psnr=199).point() is None  # then all is computed
    best = max(profile.points, key=lambda point: point.psnr)
    assert options(profile=profile, speed=profile.speed(best)).point() == best
    wanted = options(profile=profile, preset="quality").point()
    assert wanted is not None
    assert abs(len(wanted.computed) - STEPS / 2) <= 1
    fast = compiled(model, profile=profile, min_psnr=199)
    torch.testing.assert_close(sampler(fast)(1), sampler(model)(1), rtol=1e-4, atol=1e-5)


def test_a_profile_holds_for_other_batches_seeds_and_lengths(known: Known) -> None:
    model, profile, _, _ = known
    fast = compiled(model, profile=profile, preset="quality")
    point = accel.PadeOptions(profile=profile, preset="quality").point()
    assert point is not None
    for steps, batch in ((STEPS, 1), (2 * STEPS, 2), (9, 2)):
        before = accel.stats(fast).full_steps
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = sampler(fast, steps, batch)(7)
        assert torch.isfinite(result).all()
        assert not accel.stats(fast).uncalibrated
        computed = accel.stats(fast).full_steps - before
        # At the same times, however many steps there are.
        unknown = 0 if steps == STEPS else 2  # until a new length shows
        assert len(point.computed) - 1 <= computed <= len(point.computed) + unknown


def test_a_profile_of_another_model_is_never_applied(known: Known) -> None:
    """Weights, sizes, sampler: each a warning and the uncalibrated way, or an error."""
    model, profile, _, _ = known
    for other, how, why in (
        (dit(seed=1), {}, "weights"),
        (model, {"size": 12}, "sizes"),
        (model, {"shift": 3.0}, "times"),
    ):
        with torch.no_grad():
            plain = compiled(other)
            expected = sampler(plain, **how)(3)
        torch._dynamo.reset()
        fast = compiled(other, profile=profile)
        with pytest.warns(UserWarning, match=why):
            got = sampler(fast, **how)(3)
        torch.testing.assert_close(got, expected)
        assert sum(accel.stats(fast).uncalibrated.values()) >= STEPS - 3
        torch._dynamo.reset()
        strict = compiled(other, profile=profile, mismatch="raise")
        for _ in range(2):  # whoever goes on after an error gets it again
            with pytest.raises(OptionError, match=why):
                sampler(strict, **how)(3)
        torch._dynamo.reset()


def test_weights_that_change_end_a_profile(known: Known) -> None:
    _, profile, _, _ = known
    model = dit()
    fast = compiled(model, profile=profile)
    sampler(fast)(1)
    assert not accel.stats(fast).uncalibrated
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.01)
    with pytest.warns(UserWarning, match="weights"):
        sampler(fast)(1)
    assert accel.stats(fast).uncalibrated


def test_what_can_not_be_calibrated_is_said() -> None:
    model = dit()
    fast = compiled(model)
    lengths = iter((STEPS, STEPS + 1))
    draws = iter(range(100))

    def broken(seed: int) -> Tensor:
        result = sampler(fast)(seed)
        with torch.no_grad():
            fast(noise(seed=9), timestep=torch.full((2,), 7.0), class_labels=LABELS)
        return result

    def hidden(seed: int) -> Tensor:
        return sampler(model)(seed)

    cases: list[tuple[Callable[[int], Any], str]] = [
        (sampler(fast, 1), "1 steps.*nothing to gain"),
        (sampler(fast, 4), "4 steps.*nothing to gain"),
        (lambda seed: sampler(fast, next(lengths))(seed), "13 steps.*12"),
        (lambda seed: sampler(fast)(next(draws)), "two different ways"),
        (hidden, "0 graphs"),
        (broken, "no single run"),
    ]
    for run, message in cases:
        with pytest.raises(AccelError, match=message):
            accel.calibrate(fast, run)
    with pytest.raises(AccelError, match="seeds"):
        accel.calibrate(fast, sampler(fast), seeds=(3, 3))
    with pytest.raises(AccelError, match="compiled"):
        accel.calibrate(lambda x: x, sampler(fast))
    with pytest.raises(AccelError, match="data_range is 0"):
        accel.calibrate(fast, sampler(fast), data_range=0)
    with pytest.raises(AccelError, match="one value throughout"):
        accel.calibrate(fast, lambda seed: sampler(fast)(seed) * 0)


def test_nan_in_a_recording() -> None:
    model = dit()
    fast = compiled(model)

    def run(seed: int) -> Tensor:
        with accel.trajectory(fast, steps=6), torch.no_grad():
            state = noise(seed=seed)
            for step in range(6):
                state = state if step != 3 else state * math.nan
                timestep = torch.full((2,), 1000.0 - 150 * step)
                state = state - 0.1 * fast(state, timestep=timestep, class_labels=LABELS).sample
        return state

    with pytest.raises(AccelError, match="NaN or Inf in its call 4"):
        accel.calibrate(fast, run)


def test_it_is_written_when_it_is_done(tmp_path: Path) -> None:
    fast = compiled(dit())
    path = tmp_path / "profile.json"
    profile = accel.calibrate(fast, sampler(fast, 8), output=path)
    assert Profile.read(path) == profile
    assert [each.name for each in tmp_path.iterdir()] == ["profile.json"]
    again = accel.PadeOptions(profile=str(path), speed=1.01)
    assert again.profile == profile


def test_a_profile_in_an_engine(known: Known, tmp_path: Path) -> None:
    """It travels in the file, and does what it does in the compiled model."""
    model, profile, _, _ = known
    options = {"pade": {"profile": profile, "preset": "quality"}}
    example = {"timestep": torch.full((2,), 1000.0), "class_labels": LABELS}
    engine = accel.export(model, (noise(),), example, path=tmp_path / "a.onnx", options=options)
    fast = compiled(model, **options["pade"])
    torch.testing.assert_close(sampler(engine)(1), sampler(fast)(1), rtol=1e-3, atol=1e-4)
    stats, expected = accel.stats(engine), accel.stats(fast)
    assert (stats.full_steps, stats.calibrated_steps) == (expected.full_steps, STEPS)
    with pytest.raises(AccelError, match="an engine takes its profile with it"):
        accel.calibrate(engine, sampler(engine))
    with pytest.raises(accel.ExportError, match="weights that it was made with"):
        accel.export(dit(seed=3), (noise(),), example, path=tmp_path / "b.onnx", options=options)
    assert not (tmp_path / "b.onnx").exists()
