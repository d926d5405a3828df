"""Schedules: which steps are computed, and how long a run will be."""

from __future__ import annotations

import pytest
import torch
from accel import PadeOptions
from accel.kernels.errors import OptionError
from accel.passes.pade.schedule import Auto, Interval, Listed, estimate_steps, parse_schedule, place
from hypothesis import given, settings
from hypothesis import strategies as st


def run(schedule: object, steps: int, known: int | None, begun: int = 0) -> list[int]:
    """The computed steps of a run that always follows the schedule, from where it has begun."""
    computed: list[int] = []
    for step in range(begun, steps):
        last = computed[-1] if computed else -1
        if not computed or schedule.computes(step, last, known, begun):
            computed.append(step)
    return computed


@given(steps=st.integers(1, 200), share=st.floats(0.05, 1.0))
def test_placement(steps: int, share: float) -> None:
    computed = max(1, round(share * steps))
    chosen = place(steps, computed)
    assert list(chosen) == sorted(set(chosen))
    assert chosen[0] == 0
    assert chosen[-1] < steps
    assert len(chosen) == max(min(computed, steps), min(steps, 4))


def test_placement_of_the_presets() -> None:
    assert place(20, 10) == (0, 1, 2, 3, 5, 8, 10, 13, 16, 19)
    assert place(20, 8) == (0, 1, 3, 5, 8, 11, 14, 18)
    assert place(20, 6) == (0, 1, 4, 7, 11, 16)


@pytest.mark.parametrize("preset", ["quality", "balanced", "fast"])
def test_auto_follows_its_placement(preset: str) -> None:
    schedule = PadeOptions(preset=preset).plan()
    assert isinstance(schedule, Auto)
    assert run(schedule, 20, 20) == list(schedule.placed(20))
    assert len(run(schedule, 20, 20)) == {"quality": 10, "balanced": 8, "fast": 6}[preset]


@given(steps=st.integers(1, 60), share=st.floats(0.05, 1.0), begun=st.integers(0, 59))
def test_what_begins_inside_a_run_is_placed_as_a_run_of_its_own(
    steps: int, share: float, begun: int
) -> None:
    begun = min(begun, steps - 1)
    schedule = Auto(share)
    rest = [begun + step for step in schedule.placed(steps - begun)]
    assert run(schedule, steps, steps, begun) == rest


def test_an_interval_warms_up_where_a_history_begins() -> None:
    assert run(Interval(4, 3), 16, None, 6) == [6, 7, 8, 10, 14]


def test_auto_computes_everything_of_few_steps_or_unknown_length() -> None:
    schedule = Auto(0.4)
    assert run(schedule, 4, 4) == [0, 1, 2, 3]
    assert run(schedule, 9, None) == list(range(9))


@settings(deadline=None)
@given(
    steps=st.integers(4, 100),
    shift=st.floats(0.3, 12.0),
    unit=st.sampled_from([1.0, 1000.0]),
    seen=st.integers(3, 10),
)
def test_length_of_shifted_flows_is_exact(steps: int, shift: float, unit: float, seen: int) -> None:
    even = [1 - i / steps for i in range(steps)]
    times = [unit * shift * u / (1 + (shift - 1) * u) for u in even]
    assert estimate_steps(times[:seen]) == steps


def test_length_of_other_runs_is_near() -> None:
    ddim = [float(t) for t in range(981, 0, -20)]
    assert abs(estimate_steps(ddim[:3]) - 50) <= 1
    rising = [i / 20 for i in range(20)]
    assert estimate_steps(rising[:3]) == 20
    heun = [1.0] + [t for i in range(1, 20) for t in (1 - i / 20,) * 2]
    assert abs(estimate_steps(heun[:9]) - len(heun)) <= 4


@settings(deadline=None)
@given(
    steps=st.integers(4, 60),
    shift=st.floats(0.9, 12.0),
    unit=st.sampled_from([1.0, 1000.0]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.int64]),
)
def test_length_from_rounded_times(
    steps: int, shift: float, unit: float, dtype: torch.dtype
) -> None:
    """In the right order from the middle of the run on, and right at its end."""
    even = torch.tensor([1 - i / steps for i in range(steps)], dtype=torch.float64)
    times = unit * shift * even / (1 + (shift - 1) * even)
    if dtype is torch.int64:
        times, error = (times / unit * 1000).to(dtype), (0.0, 1.0)
    else:
        times, error = times.to(dtype), (torch.finfo(dtype).eps / 2, 0.0)
    for seen in range(max(4, steps // 2 + 1), steps + 1):
        found = estimate_steps(times[:seen].tolist(), *error)
        assert found is not None
        # Of large shifts, bfloat16 leaves next to nothing to tell a length by before the end.
        assert dtype is torch.bfloat16 or abs(found - steps) <= max(3, steps // 4)
    assert abs(found - steps) <= 1
    assert steps > 4 or found == 4


@pytest.mark.parametrize(
    "times", [[1.0], [1.0, 0.95], [1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]
)
def test_length_unknown(times: list[float]) -> None:
    assert estimate_steps(times) is None


def test_interval() -> None:
    assert run(Interval(4, 1), 10, None) == [0, 4, 8]
    assert run(Interval(4, 3), 12, None) == [0, 1, 2, 6, 10]
    assert run(Interval(4, 1), 10, 10) == [0, 4, 8, 9]


def test_listed_computes_what_lies_beyond_the_list() -> None:
    assert run(Listed((0, 1, 4)), 10, None) == [0, 1, 4, 8, 9]
    assert run(Listed((0,)), 3, None) == [0, 1, 2]


def test_listed_beyond_the_run() -> None:
    with pytest.raises(OptionError, match=r"step 25, but the run has only 20"):
        Listed((0, 25)).check(20)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("often", "none of 'auto'"),
        ([], "none of 'auto'"),
        ([1, 2], "leaves out step 0"),
        ([0, -1], "not steps"),
        ([0, 1.5], "not steps"),
        ({"warmup": 3}, "has to be"),
        ({"interval": 0}, "whole number"),
        ({"interval": 2, "warm": 1}, "has to be"),
        (3, "none of 'auto'"),
    ],
)
def test_malformed(value: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_schedule(value, "balanced")
