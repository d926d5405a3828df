"""What each predictor forecasts: exact cases, plain references, options."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from accel.kernels.errors import OptionError
from accel.kernels.predictors import PREDICTORS, Predictor
from accel.kernels.predictors.chebyshev import Chebyshev
from accel.kernels.predictors.damped import Damped
from accel.kernels.predictors.hermite import Hermite
from accel.kernels.predictors.pade import Pade
from accel.kernels.predictors.polynomial import Taylor
from accel.tests.kernels.predictors.histories import (
    each_history,
    gaps,
    predict,
    spaced,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor


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


def test_a_damped_start_and_what_has_turned_back() -> None:
    """Shares of the line where two residuals are known, and where the last differences disagree;
    otherwise what is not damped."""
    damped, plain = Pade(start=0.3, turned=0.75), Pade()
    newest, middle = torch.randn(2, 2, 20, generator=torch.Generator().manual_seed(1))
    line = newest - middle
    young = torch.tensor([0.0, -2.0, -3.0, -3.0])[:, None].expand(-1, 2)
    got = predict(damped, [newest, middle, middle], young)
    torch.testing.assert_close(got, newest + 0.3 * 2 * line)
    times = torch.tensor([0.0, -2.0, -3.0, -5.0])[:, None].expand(-1, 2)
    back, on = middle + 0.5 * line, middle - 0.5 * line
    got = predict(damped, [newest, middle, back], times)
    torch.testing.assert_close(got, newest + 0.75 * 2 * line)
    assert torch.equal(predict(plain, [newest, middle, back], times), newest)
    expected = predict(plain, [newest, middle, on], times)
    torch.testing.assert_close(predict(damped, [newest, middle, on], times), expected)
    still = predict(
        damped, [newest, middle, middle], times
    )  # nothing moved before: a straight line
    torch.testing.assert_close(still, newest + 2 * line, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gaps", [(1.0, 1.0, 1.0), (2.0, 1.0, 3.0), (0.5, 4.0, 1.0)])
def test_damped_is_the_line_with_half_of_what_the_last_step_showed(
    gaps: tuple[float, float, float],
) -> None:
    """Against the slope that least squares finds for the newest residual, by a fine grid."""
    predictor = PREDICTORS["damped"]
    assert isinstance(predictor, Damped)
    draw = torch.Generator().manual_seed(3)
    oldest, step, turn = torch.randn(3, 2, 40, generator=draw).double()
    middle, (ahead, last, before) = oldest + step, gaps
    times = torch.tensor([0.0, -ahead, -ahead - last, -ahead - last - before])
    times = times[:, None].expand(-1, 2)
    for share in (0.4, 1.0, 2.0, -0.5):  # of the line, that the newest residual followed
        newest = middle + share * step * last / before + 0.05 * turn
        grid = torch.linspace(0, predictor.most, 1201).double()
        line = middle + grid[:, None, None] * step * last / before
        observed = grid[(line - newest).square().sum(-1).argmin(0)]
        if share < 0:
            observed = torch.full_like(observed, predictor.usual)
        slope = (observed + predictor.usual) / 2
        expected = newest + slope[:, None] * (newest - middle) * ahead / last
        got = predict(predictor, [each.float() for each in (newest, middle, oldest)], times)
        torch.testing.assert_close(got, expected.float(), rtol=1e-3, atol=2e-3)
    young = torch.tensor([0.0, -1.0, -2.0, -2.0])[:, None].expand(-1, 2)
    got = predict(predictor, [each.float() for each in (middle, oldest, oldest)], young)
    torch.testing.assert_close(got, middle.float())


def hermite_reference(predictor: Hermite, times: Any, residuals: list[Any], left: float) -> Any:
    """One sample: divided differences of the residuals themselves, numpy's Hermite series."""
    count = len(dict.fromkeys(times[1:]))
    unit = times[1] - times[2]
    table, differences = list(residuals[:count]), [residuals[0]]
    for degree in range(1, min(count, predictor.order + 1)):
        table = [
            (newer - older) / ((times[1 + i] - times[1 + i + degree]) / unit)
            for i, (newer, older) in enumerate(itertools.pairwise(table))
        ]
        differences.append(table[0])
    ahead = (times[0] - times[1]) / unit if len(differences) > 1 else 0.0

    def basis(degree: int, at: float) -> float:
        scaled = numpy.polynomial.hermite.hermval(predictor.scale * at, [0] * degree + [1])
        return float(predictor.scale**degree * scaled)

    return residuals[0] + sum(
        difference * (basis(degree, ahead) - basis(degree, 0.0))
        for degree, difference in enumerate(differences)
    )


def chebyshev_reference(predictor: Chebyshev, times: Any, residuals: list[Any], left: float) -> Any:
    """One sample: a ridge regression with a free constant, on the residuals themselves."""
    count = len(dict.fromkeys(times[1:]))
    nodes, values = times[1 : 1 + count], numpy.stack(residuals[:count])
    end = nodes[-1] - (nodes[-1] - times[0]) / (1 - left)

    def basis(at: Any) -> Any:
        place = 2 * (numpy.asarray(at) - end) / (nodes[-1] - end) - 1
        return numpy.polynomial.chebyshev.chebvander(place, predictor.degree)

    penalty = predictor.ridge * numpy.eye(predictor.degree + 1)
    penalty[0, 0] = 0
    design, flat = basis(nodes), values.reshape(count, -1)
    fitted = numpy.linalg.solve(design.T @ design + penalty, design.T @ flat)
    series = (basis(times[0]) @ fitted).reshape(values.shape[1:])
    line = values[0]
    if count > 1:
        line = line + (values[0] - values[1]) * (times[0] - nodes[0]) / (nodes[0] - nodes[1])
    return predictor.share * series + (1 - predictor.share) * line


@pytest.mark.parametrize(
    ("predictor", "reference"),
    [
        (Hermite(), hermite_reference),
        (Hermite(order=1, scale=0.5), hermite_reference),
        (Hermite(order=4, scale=0.75), hermite_reference),
        (Chebyshev(), chebyshev_reference),
        (Chebyshev(history=3, degree=1, ridge=0.5, share=1.0), chebyshev_reference),
        (Chebyshev(history=12, degree=6, ridge=1e-3, share=0.25), chebyshev_reference),
    ],
)
@pytest.mark.parametrize("left", [0.1, 0.8])
def test_values_are_those_of_a_plain_reference(
    predictor: Any, reference: Callable[..., Any], left: float
) -> None:
    """Every length of history, each sample of a batch with times of its own."""
    for seed in range(3):
        times, residuals = each_history(predictor, seed)
        got = predict(predictor, residuals, times, left)
        for sample in range(got.shape[0]):
            own = [residual[sample].double().numpy() for residual in residuals]
            expected = reference(predictor, times[:, sample].tolist(), own, left)
            torch.testing.assert_close(
                got[sample].double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-4
            )
        torch.testing.assert_close(got[0], residuals[0][0])  # one residual known: reuse


def test_hermite_is_taylor_with_contracted_powers() -> None:
    """With s = sqrt(1/2) the line through two residuals; below that 2 s^2 of its slope."""
    history = [torch.tensor([[4.0]]), torch.tensor([[3.0]])]
    times = torch.tensor([[1.0], [2.0], [3.0]])
    for scale, answer in ((math.sqrt(0.5), 5.0), (0.5, 4.5)):
        got = predict(Hermite(order=1, scale=scale), history, times)
        assert float(got) == pytest.approx(answer)


def test_chebyshev_in_the_limits_of_its_options() -> None:
    """Without the series the line, and with an overwhelming ridge the mean of all residuals."""
    line = Chebyshev(share=0.0)
    times, residuals = each_history(line, 0)
    expected = predict(Taylor(order=1), residuals[:2], times[:3])
    torch.testing.assert_close(predict(line, residuals, times), expected)
    mean = Chebyshev(share=1.0, ridge=1e12)
    got = predict(mean, residuals, times)[-1]
    torch.testing.assert_close(got, torch.stack(residuals).mean(0)[-1])


def test_chebyshev_does_not_depend_on_the_unit_or_direction_of_time() -> None:
    predictor = PREDICTORS["chebyshev"]
    times, residuals = each_history(predictor, 1)
    expected = predict(predictor, residuals, times)
    for other in (times / 1000, 7 - 3 * times):
        torch.testing.assert_close(predict(predictor, residuals, other), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Hermite(order=0), "order is 0"),
        (lambda: Hermite(scale=0.0), "scale is 0.0"),
        (lambda: Hermite(scale=math.inf), "scale is inf"),
        (lambda: Chebyshev(history=1), "history is 1"),
        (lambda: Chebyshev(degree=0), "degree is 0"),
        (lambda: Chebyshev(ridge=0.0), "ridge is 0.0"),
        (lambda: Chebyshev(share=1.5), "share is 1.5"),
        (lambda: Damped(usual=-0.1), "usual is -0.1"),
        (lambda: Damped(most=0.5), "usual is 0.75 and most 0.5"),
    ],
)
def test_options_of_predictors_are_checked(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


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
