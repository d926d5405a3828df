"""What predicted steps missed, and how much of it is given back."""

from __future__ import annotations

import math

import pytest
import torch
from accel.passes.pade.rules import CarriedAnswer, given_back, nothing_owed, owed_more
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

FORM = (2, 3, 4)
ALL, HALF = torch.ones(2).double(), torch.full((2,), 0.5).double()
TIMES = st.lists(st.floats(0.05, 1.0), min_size=3, max_size=7)
WEIGHTS = st.sampled_from([1.0, -0.05, 2.5])


def times_of(gaps: list[float]) -> list[Tensor]:
    """Falling times, other ones for each of two samples."""
    falling = -torch.tensor(gaps, dtype=torch.float64).cumsum(0)
    return list(torch.stack([falling, 3 * falling], 1))


def wide(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1).float()


def owed(answers: list[Tensor], times: list[Tensor], weights: list[Tensor]) -> CarriedAnswer:
    """After a computed step and predicted ones."""
    found = nothing_owed(answers[0], times[0])
    for answer, time, weight in zip(answers[1:], times[1:], weights[1:], strict=True):
        found = owed_more(found, answer, time, weight)
    return found


@settings(deadline=None, max_examples=60, derandomize=True)
@given(TIMES, WEIGHTS, st.integers(0, 10**6), st.floats(0, 1))
def test_the_share_of_what_was_missed(
    gaps: list[float], scale: float, seed: int, share: float
) -> None:
    """Against the formula: the sum of what lies between the computed answers less the predicted."""
    draw = torch.Generator().manual_seed(seed)
    times = times_of(gaps)
    answers = [torch.randn(FORM, generator=draw) for _ in times]
    weights = [scale * (0.5 + torch.rand(2, generator=draw).double()) for _ in times]
    first, last = answers[0], answers[-1]
    missed = torch.zeros(FORM)
    for answer, time, weight in zip(answers[1:-1], times[1:-1], weights[1:-1], strict=True):
        along = wide((time - times[0]) / (times[-1] - times[0]))
        between = first + along * (last - first)
        missed += wide(weight / weights[-1]) * (between - answer)
    before = owed(answers[:-1], times[:-1], weights[:-1])
    got = given_back(before, last, times[-1], weights[-1], torch.full((2,), share).double())
    torch.testing.assert_close(got, last + share * missed, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(TIMES, st.integers(0, 10**6))
def test_answers_on_a_straight_line_missed_nothing(gaps: list[float], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    start, slope = (torch.randn(FORM, generator=draw) for _ in range(2))
    times = times_of(gaps)
    answers = [start + wide(time) * slope for time in times]
    weights = [torch.ones(2).double()] * len(times)
    before = owed(answers[:-1], times[:-1], weights[:-1])
    got = given_back(before, answers[-1], times[-1], weights[-1], ALL)
    torch.testing.assert_close(got, answers[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40])
def test_scaled_answers_give_the_scaled_one(scale: float) -> None:
    times, weights = times_of([0.1] * 4), [torch.ones(2).double()] * 4
    answers = [torch.randn(FORM) for _ in times]

    def corrected(factor: float) -> Tensor:
        scaled = [each * factor for each in answers]
        before = owed(scaled[:-1], times[:-1], weights[:-1])
        return given_back(before, scaled[-1], times[-1], weights[-1], HALF)

    torch.testing.assert_close(corrected(scale) / scale, corrected(1.0))


def test_nothing_is_owed_after_a_computed_step() -> None:
    times, one = times_of([0.1] * 3), torch.ones(2).double()
    answers = [torch.randn(FORM) for _ in times]
    before = nothing_owed(answers[1], times[1])
    assert torch.equal(given_back(before, answers[2], times[2], one, ALL), answers[2])


@pytest.mark.parametrize("unknown", ["weight before", "weight now", "no weight", "no time between"])
def test_what_is_not_known_is_not_given_back(unknown: str) -> None:
    """For the sample that it is not known of; the other one's is."""
    times, weights = times_of([0.1] * 3), [torch.ones(2).double() for _ in range(3)]
    if unknown == "weight before":
        weights[1][0] = math.nan
    elif unknown == "weight now":
        weights[2][0] = math.nan
    elif unknown == "no weight":
        weights[2][0] = 0.0
    else:
        times[2][0] = times[0][0]
    answers = [torch.randn(FORM) for _ in times]
    before = owed(answers[:-1], times[:-1], weights[:-1])
    got = given_back(before, answers[2], times[2], weights[2], HALF)
    assert torch.equal(got[0], answers[2][0])
    assert not torch.equal(got[1], answers[2][1])


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_predicted_answers_that_overflow_spoil_nothing(broken: float) -> None:
    times, one = times_of([0.1] * 3), torch.ones(2).double()
    answers = [torch.randn(FORM) for _ in times]
    answers[1][0, 0, 0] = broken
    before = owed(answers[:-1], times[:-1], [one] * 2)
    got = given_back(before, answers[2], times[2], one, HALF)
    assert got.isfinite().all()
    assert got[0, 0, 0] == answers[2][0, 0, 0]


def test_an_answer_that_its_owner_writes_into_is_kept_as_it_was() -> None:
    times = times_of([0.1] * 2)
    answer = torch.randn(FORM)
    kept = nothing_owed(answer, times[0])
    before = answer.clone()
    answer.zero_()
    assert torch.equal(kept.computed, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_stay(dtype: torch.dtype) -> None:
    times, one = times_of([0.1] * 3), torch.ones(2).double()
    answers = [torch.randn(FORM).to(dtype) for _ in times]
    got = given_back(owed(answers[:-1], times[:-1], [one] * 2), answers[2], times[2], one, HALF)
    assert got.dtype == dtype
