"""Properties that every predictor has, on arbitrary residuals and spacings."""

from __future__ import annotations

import math

import pytest
import torch
from accel.kernels.errors import OptionError
from accel.kernels.predictors import PREDICTORS, Predictor, judge, moments, resolve
from accel.kernels.predictors.pade import Pade
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

# TC-Padé reproduces neither constants nor scale, as printed and as released; see its docstring.
SOUND = {name: p for name, p in PREDICTORS.items() if not name.startswith("tc-pade")}
SHAPES = [(1, 3), (2, 5, 7), (3, 1, 2), (2, 3, 4, 5)]

gaps = st.lists(st.floats(0.01, 5.0), min_size=4, max_size=4)
scales = st.floats(1e-6, 1e6)


def spaced(predictor: Predictor, spacing: list[float], batch: int) -> Tensor:
    """Times that fall by the given gaps, the step to predict first: `[history + 1, batch]`."""
    times = [0.0]
    for gap in spacing[: predictor.history]:
        times.append(times[-1] + gap)
    return torch.tensor(times)[:, None].expand(-1, batch).contiguous()


def predict(
    predictor: Predictor, residuals: list[Tensor], times: Tensor, left: float = 0.5
) -> Tensor:
    """As a run does it: moments of the newest residual, coefficients, then the forecast."""
    newest, *older = residuals
    measured = moments(newest, older or [newest], newest, predictor.granularity)
    coefficients = predictor.coefficients(
        times.double(), torch.tensor(left, dtype=torch.float64), measured.double()
    )
    inputs = [torch.zeros_like(newest)] * 2 if predictor.reads_inputs else []
    known = None if coefficients is None else coefficients.float()
    return predictor.predict(residuals, known, inputs)


def random_residuals(predictor: Predictor, shape: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    return [base + 0.1 * torch.randn(shape, generator=generator) for _ in range(predictor.history)]


@pytest.mark.parametrize("name", SOUND)
@settings(max_examples=20, deadline=None)
@given(spacing=gaps, scale=scales, shape=st.sampled_from(SHAPES))
def test_constants_are_reproduced(
    name: str, spacing: list[float], scale: float, shape: tuple[int, ...]
) -> None:
    predictor = SOUND[name]
    constant = torch.randn(shape) * scale
    out = predict(predictor, [constant] * predictor.history, spaced(predictor, spacing, shape[0]))
    torch.testing.assert_close(out, constant)


@pytest.mark.parametrize("name", SOUND)
@settings(max_examples=20, deadline=None)
@given(spacing=gaps, scale=scales, shape=st.sampled_from(SHAPES), seed=st.integers(0, 99))
def test_scale_equivariance(
    name: str, spacing: list[float], scale: float, shape: tuple[int, ...], seed: int
) -> None:
    predictor = SOUND[name]
    residuals = random_residuals(predictor, shape, seed)
    times = spaced(predictor, spacing, shape[0])
    once = predict(predictor, residuals, times)
    scaled = predict(predictor, [residual * scale for residual in residuals], times)
    size = float(once.abs().max())
    assert float((scaled / scale - once).abs().max()) <= 2e-3 * size


@pytest.mark.parametrize("name", PREDICTORS)
@settings(max_examples=25, deadline=None)
@given(
    spacing=st.lists(st.floats(0.0, 1e4), min_size=4, max_size=4),
    exponents=st.lists(st.integers(-38, 38), min_size=3, max_size=3),
    left=st.floats(0, 1),
)
def test_never_nan_or_infinite(
    name: str, spacing: list[float], exponents: list[int], left: float
) -> None:
    predictor = PREDICTORS[name]
    residuals = [
        torch.randn(2, 3, 4).clamp(-3, 3) * 10.0 ** exponents[age % 3]
        for age in range(predictor.history)
    ]
    out = predict(predictor, residuals, spaced(predictor, spacing, 2), left)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", PREDICTORS)
def test_zeros_stay_finite(name: str) -> None:
    predictor = PREDICTORS[name]
    zeros = [torch.zeros(2, 3, 4)] * predictor.history
    out = predict(predictor, zeros, spaced(predictor, [1.0] * 4, 2))
    assert torch.equal(out, torch.zeros(2, 3, 4))


@pytest.mark.parametrize("name", ["linear", "taylor-2", "taylor-3", "pade", "pade-token"])
@settings(max_examples=20, deadline=None)
@given(spacing=st.lists(st.floats(0.2, 2.0), min_size=4, max_size=4))
def test_straight_lines_are_exact(name: str, spacing: list[float]) -> None:
    predictor = PREDICTORS[name]
    offset, slope = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    times = spaced(predictor, spacing, 2)
    residuals = [offset + slope * times[1 + age, 0] for age in range(predictor.history)]
    torch.testing.assert_close(predict(predictor, residuals, times), offset, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("order", [2, 3])
@settings(max_examples=20, deadline=None)
@given(spacing=st.lists(st.floats(0.2, 1.0), min_size=4, max_size=4))
def test_taylor_is_exact_on_polynomials(order: int, spacing: list[float]) -> None:
    predictor = PREDICTORS[f"taylor-{order}"]
    coefficients = torch.randn(order + 1, 2, 3)
    times = spaced(predictor, spacing, 2)

    def value(time: float) -> Tensor:
        return sum(c * time**power for power, c in enumerate(coefficients))

    residuals = [value(float(times[1 + age, 0])) for age in range(predictor.history)]
    out = predict(predictor, residuals, times)
    torch.testing.assert_close(out, coefficients[0], rtol=1e-2, atol=1e-2)


@settings(max_examples=50, deadline=None)
@given(
    spacing=st.lists(st.floats(0.1, 1.0), min_size=4, max_size=4),
    rate=st.floats(0.01, 4.0),
    granularity=st.sampled_from(["pade", "pade-channel", "pade-token"]),
)
def test_pade_is_exact_on_geometric_decay(
    spacing: list[float], rate: float, granularity: str
) -> None:
    """Against the float64 reference of the decay itself, on uneven spacing."""
    predictor = PREDICTORS[granularity]
    limit, gone = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    times = spaced(predictor, spacing, 2)

    def value(time: float) -> Tensor:
        return (limit.double() + gone.double() * math.exp(rate * time)).float()

    residuals = [value(float(times[1 + age, 0])) for age in range(predictor.history)]
    out = predict(predictor, residuals, times)
    size = float(residuals[-1].abs().max())
    assert float((out - value(0.0)).abs().max()) <= 5e-3 * size


def test_one_ratio_per_sample_not_per_batch() -> None:
    """A sample that decays and one that does not share a batch without disturbing each other."""
    predictor = PREDICTORS["pade"]
    times = spaced(predictor, [1.0, 1.0, 1.0], 2)
    decay = [torch.full((3,), math.exp(float(t))) for t in times[1:, 0]]
    constant = torch.ones(3)
    residuals = [torch.stack([each, constant]) for each in decay]
    torch.testing.assert_close(
        predict(predictor, residuals, times), torch.ones(2, 3), rtol=1e-4, atol=1e-4
    )


@settings(max_examples=30, deadline=None)
@given(spacing=gaps, turn=st.floats(0, 1), seed=st.integers(0, 99))
def test_pade_leaves_its_line_by_a_share_of_what_a_parabola_does(
    spacing: list[float], turn: float, seed: int
) -> None:
    """Across the newest difference, whatever the spacing."""
    generator = torch.Generator().manual_seed(seed)
    oldest, newest, aside = torch.randn(3, 1, 40, generator=generator)
    before = 0.8 * newest + 0.5 * aside
    residuals = [oldest + before + newest, oldest + before, oldest]
    residuals = [residual[None] for residual in residuals]
    times = spaced(PREDICTORS["pade"], spacing, 1)

    def across(predictor: Predictor) -> Tensor:
        moved = (predict(predictor, residuals, times) - residuals[0])[0]
        return moved - (moved * newest).sum() / newest.square().sum() * newest

    parabola = across(PREDICTORS["taylor-2"])
    got = across(Pade(turn=turn))
    assert (got - turn * parabola).norm() <= 1e-3 * (parabola.norm() + newest.norm())


@pytest.mark.parametrize("name", ["linear", "taylor-3", "pade"])
def test_young_runs_fall_back(name: str) -> None:
    """One residual known: reuse. Two known: the straight line through them."""
    predictor = PREDICTORS[name]
    newest, older = torch.randn(2, 3), torch.randn(2, 3)
    one = spaced(predictor, [1.0] + [0.0] * 3, 2)
    torch.testing.assert_close(predict(predictor, [newest] * predictor.history, one), newest)
    two = spaced(predictor, [1.0, 2.0] + [0.0] * 2, 2)
    out = predict(predictor, [newest] + [older] * (predictor.history - 1), two)
    torch.testing.assert_close(out, newest + (newest - older) / 2, rtol=1e-4, atol=1e-4)


def test_direction_of_time() -> None:
    """A rising residual goes on rising, whether times fall or rise."""
    for name in ("linear", "pade"):
        predictor = PREDICTORS[name]
        times = spaced(predictor, [1.0] * 4, 1)
        residuals = [torch.tensor([[3.0 - age]]) for age in range(predictor.history)]
        for signed in (times, -times):
            assert float(predict(predictor, residuals, signed)) == pytest.approx(4.0, abs=1e-4)


def test_release_answers_a_constant_with_its_tenfold_tenth() -> None:
    """TC-Padé's release inflates a constant by 10% (measured by others too)."""
    predictor = PREDICTORS["tc-pade-release"]
    out = predict(predictor, [torch.ones(1, 4)] * 2, spaced(predictor, [1.0] * 2, 1))
    torch.testing.assert_close(out, torch.full((1, 4), 1.1))


def test_paper_depends_on_units() -> None:
    """TC-Padé as printed: a constant 10 becomes 5, a constant 1 becomes 0.91."""
    predictor = PREDICTORS["tc-pade-paper"]
    times = spaced(predictor, [1.0] * 3, 1)
    for constant, answer in ((10.0, 5.0), (1.0, 1 / 1.1)):
        out = predict(predictor, [torch.full((1, 4), constant)] * 3, times)
        torch.testing.assert_close(out, torch.full((1, 4), answer))


def test_signals() -> None:
    actual = torch.tensor([[3.0, 4.0], [0.0, 5.0]])
    guess = torch.tensor([[3.0, 4.0], [0.0, 4.0]])
    east = torch.tensor([[2.0, 4.0], [0.0, 4.0]])
    earlier = [east, east - torch.tensor([1.0, 0.0])]
    for granularity in ("sample", "token", "channel"):
        shape = (2, 2) if granularity != "channel" else (2, 1, 2)
        views = [each.view(shape) for each in (actual, *earlier, guess)]
        measured = moments(views[0], views[1:3], views[3], granularity)
        signals = judge([measured])
        assert signals.finite
        # The first sample goes straight on (chord 0), the second turns by 90 degrees.
        assert signals.turn == pytest.approx(math.sqrt(2) / 2, abs=1e-3)
        assert signals.error == pytest.approx(0.2)
        broken = moments(views[0] * float("nan"), views[1:3], views[3], granularity)
        assert not judge([measured, broken]).finite
        assert judge([measured, broken]).error == math.inf


def test_unknown_name() -> None:
    with pytest.raises(OptionError, match="known: pade"):
        resolve("pad")
