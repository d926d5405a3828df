"""The predictor whose slopes come from a recorded run."""

from __future__ import annotations

import pytest
import torch
from accel.kernels.predictors import PREDICTORS
from accel.kernels.predictors.recorded import Recorded, same_form
from accel.passes.pade.trial import accepted
from torch import Tensor

TIMES = (900.0, 700.0, 500.0, 200.0, 10.0)


def residuals() -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(5, 30, generator=draw, dtype=torch.float64)


def products() -> tuple[tuple[float, ...], ...]:
    values = residuals()
    return tuple(tuple(row) for row in (values @ values.T).tolist())


SOURCE = Recorded(TIMES, products())


def slope(times: list[float], left: float) -> float:
    known = SOURCE.coefficients(
        torch.tensor(times, dtype=torch.float64)[:, None], torch.tensor(left).double(),
        torch.zeros(5, 1, 1),
    )  # fmt: skip
    assert known is not None
    assert known.shape == (2, 1, 1)
    assert float(known[1]) == 0
    return float(known[0])


def test_the_slope_is_the_recorded_run_s_best() -> None:
    values = residuals()
    for now, newest, before in ((2, 1, 0), (3, 2, 0), (4, 1, 0), (4, 3, 2)):
        along, wanted = values[newest] - values[before], values[now] - values[newest]
        best = float(wanted @ along / (along @ along))
        times = [TIMES[now], TIMES[newest], TIMES[before], TIMES[before]]
        left = 1 - now / 5
        assert slope(times, left) == pytest.approx(best)
        # What is added to all times, as embedded guidance is, says nothing.
        assert slope([each + 3.5 for each in times], left) == pytest.approx(best)


def test_between_recorded_steps_it_takes_straight_lines() -> None:
    values = residuals()
    middle = 0.5 * (values[2] + values[3])  # at 350
    along, wanted = values[2] - values[1], middle - values[2]
    best = float(wanted @ along / (along @ along))
    assert slope([350.0, 500.0, 700.0, 900.0], 1 - 2.5 / 5) == pytest.approx(best)


def test_with_one_residual_it_reuses() -> None:
    assert slope([700.0, 900.0, 900.0, 900.0], 0.8) == 0


def test_it_is_sound() -> None:
    """Constants, scales, a graph, odd times: as any predictor that a user hands over."""
    assert accepted(SOURCE) is SOURCE
    still = Recorded(TIMES, ((1.0,) * 5,) * 5)  # nothing ever moved
    assert accepted(still) is still


def test_it_stands_in_for_predictors_of_its_form_alone() -> None:
    """A graph is compiled for so many residuals and coefficients."""
    fitting = [name for name, each in PREDICTORS.items() if same_form(each)]
    assert fitting == ["pade", "pade-damped", "damped"]
    assert same_form(SOURCE)


def test_equal_recordings_are_equal_predictors() -> None:
    assert Recorded(TIMES, products()) == SOURCE
    assert hash(Recorded(TIMES, products())) == hash(SOURCE)
    assert Recorded(TIMES[::-1], products()) != SOURCE
