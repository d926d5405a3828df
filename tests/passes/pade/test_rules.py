"""The rules of a run say the same of Python's values and of tensors, and what they should."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from accel.kernels.predictors import PREDICTORS
from accel.passes.pade import rules
from accel.passes.pade.rules import Carried, CarriedStream
from accel.passes.pade.state import StackState, StreamInputs, StreamOutputs, StreamState
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

NAMES = ("pade", "reuse", "taylor-2", "tc-pade-release")
STEP = st.tuples(st.booleans(), st.booleans(), st.floats(0, 2), st.integers(0, 3))


def as_tensors(carried: Carried) -> Carried:
    """The same run, as a graph has it."""
    return replace(
        carried,
        step=torch.tensor([carried.step]),
        last=torch.tensor([carried.last]),
        known=torch.tensor([carried.known]),
        trusted=torch.tensor([carried.trusted]),
    )


def values(carried: Carried) -> list[Tensor]:
    numbers = [carried.step, carried.last, carried.known, carried.trusted]
    flat = [torch.as_tensor(each).reshape(1) for each in numbers]
    flat += carried.times
    for stream in carried.streams:
        flat += [stream.moments, *stream.residuals]
        flat += [] if stream.previous is None else [stream.previous]
    return flat


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(NAMES), st.lists(STEP, min_size=1, max_size=7))
def test_numbers_and_tensors_agree(name: str, steps: list[tuple[bool, bool, float, int]]) -> None:
    predictor = PREDICTORS[name]
    blank = torch.zeros(2, 3)
    stream = CarriedStream(
        torch.zeros(5, 1),
        (blank,) * predictor.history,
        blank if predictor.reads_inputs else None,
    )
    plain = rules.begin(predictor.history, torch.zeros(2).double(), [stream])
    graph = as_tensors(plain)
    for number, (planned, finite, error, time) in enumerate(steps):
        now = torch.full((2,), 10.0 - time).double()
        compute = rules.decide(plain, planned)
        assert compute == bool(rules.decide(graph, torch.tensor([planned])))
        made = [StreamOutputs(torch.full((5, 1), 1.0 + number), torch.full((2, 3), 1.0 * number),
                              blank + number if predictor.reads_inputs else None)]  # fmt: skip
        remaining = torch.tensor(0.5).double()
        ones = rules.arguments([predictor], plain, now, remaining)
        others = rules.arguments([predictor], graph, now, remaining)
        for one, other in zip(ones, others, strict=True):
            flat = [one.coefficients, *one.residuals], [other.coefficients, *other.residuals]
            assert [each is None for each in flat[0]] == [each is None for each in flat[1]]
            for left, right in zip(*flat, strict=True):
                if left is not None:
                    torch.testing.assert_close(left, right, equal_nan=True)
        plain = rules.record(plain, predictor, bool(compute), finite, now, made)
        graph = rules.record(
            graph, predictor, torch.tensor(bool(compute)), torch.tensor(finite), now, made
        )
        if compute:
            plain = replace(plain, trusted=rules.trusted(plain.known, finite, error, 1.0))
        sound = rules.trusted(graph.known, torch.tensor(finite), torch.tensor(error), 1.0)
        trusted = rules.choose(torch.tensor([bool(compute)]), sound, graph.trusted)
        graph = replace(graph, trusted=trusted)
        for left, right in zip(values(plain), values(graph), strict=True):
            assert torch.equal(left.double(), right.double())


def recorded(times: list[float], finite: list[bool], history: int = 3) -> Carried:
    predictor = PREDICTORS["pade"]
    stream = CarriedStream(torch.zeros(5, 1), (torch.zeros(1),) * history)
    carried = rules.begin(history, torch.zeros(1).double(), [stream])
    for number, (time, sound) in enumerate(zip(times, finite, strict=True)):
        made = [StreamOutputs(torch.ones(5, 1), torch.full((1,), number + 1.0), None)]
        now = torch.full((1,), time).double()
        carried = rules.record(carried, predictor, True, sound, now, made)
    return carried


def residuals(carried: Carried) -> list[float]:
    return [float(each) for each in carried.streams[0].residuals]


def test_a_young_run_repeats_its_oldest_residual() -> None:
    carried = recorded([9.0, 8.0], [True, True])
    assert residuals(carried) == [2.0, 1.0, 1.0]
    assert carried.known == 2


def test_two_steps_at_one_time_replace_each_other() -> None:
    carried = recorded([9.0, 8.0, 8.0], [True] * 3)
    assert residuals(carried) == [3.0, 1.0, 1.0]
    assert carried.known == 2
    assert not carried.streams[0].moments.any()  # they describe a history that is gone


def test_what_is_not_finite_never_enters_the_history() -> None:
    assert residuals(recorded([9.0, 8.0, 7.0], [True, True, False])) == [2.0, 1.0, 1.0]
    late = recorded([9.0, 8.0, 7.0], [True] * 3).forget_newest()
    assert residuals(late) == [2.0, 1.0, 1.0]
    assert late.known == 2


@pytest.mark.parametrize("name", ["pade", "reuse", "tc-pade-release"])
def test_the_layout_of_the_state(name: str) -> None:
    """What `pack` lays out is what `inputs` names, and `by_stream` takes apart."""
    cpu = torch.device("cpu")
    streams = tuple(
        StreamState((2, width), torch.float32, cpu, (5, 2, 1), (3, 2) if width > 1 else None)
        for width in (4, 1)
    )
    clock: Any = None
    state = StackState(streams, 2, PREDICTORS[name], clock, 2)
    filled = [
        torch.zeros(slot.shape, dtype=slot.dtype) + number
        for number, slot in enumerate(state.inputs)
    ]
    taken = state.by_stream(filled[1:])
    assert all(isinstance(each, StreamInputs) for each in taken)
    packed = state.pack(filled[0], taken)
    assert [id(each) for each in packed] == [id(each) for each in filled]
    results = [torch.full(slot.shape, 1.0 * number) for number, slot in enumerate(state.outputs)]
    unpacked = state.unpack(results)
    flat = [each for stream in unpacked for each in stream if each is not None]
    assert [id(each) for each in flat] == [id(each) for each in results]
    assert len({slot.name for slot in (*state.inputs, *state.outputs)}) == len(filled) + len(
        results
    )
