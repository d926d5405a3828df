"""How long a run is, and what of it is planned where its state begins inside it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import accel
import pytest
import torch
from accel.tests.models import dit, euler, noise
from torch import Tensor

SPACINGS: dict[str, Callable[[float], float]] = {
    "even": lambda u: u,
    "shifted": lambda u: 3 * u / (1 + 2 * u),
    "Karras": lambda u: (0.55 + 0.45 * u) ** 7,
    "exponential": lambda u: math.exp(4 * (u - 1)),
    "cosine": lambda u: 1 - math.cos(u * math.pi / 2),
    "rising": lambda u: 1 - u,
}
LABELS = torch.tensor([1, 2])


# Random weights predict badly; what is tested is which steps are predicted.
OPTIONS: dict[str, Any] = {"lowering": "eager", "pade": {"max_error": 1e9}}


def compiled() -> Any:
    return torch.compile(dit(2), backend="accel", fullgraph=True, options=OPTIONS)


@torch.no_grad()
def heun(model: Any, start: Tensor, labels: Tensor, *, times: list[float]) -> list[Tensor]:
    """Heun's method, which calls the model twice at each time but the first; the last output."""
    state = start

    def velocity(sample: Tensor, time: float) -> Tensor:
        timestep = torch.full((len(sample),), time * 1000)
        return model(sample, timestep=timestep, class_labels=labels, return_dict=False)[0]

    for now, after in itertools.pairwise(times):
        first = velocity(state, now)
        second = velocity(state + (after - now) * 0.3 * first, after)
        state = state + (after - now) * 0.15 * (first + second)
    return [velocity(state, times[-1])]


@pytest.mark.parametrize("cancelled", [0, 3])
@pytest.mark.parametrize("sampler", [euler, heun])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_later_run_keeps_to_the_plan(spacing: str, sampler: Any, cancelled: int) -> None:
    """Runs that were cut off cost the next one steps that are computed, and nothing else."""
    steps = 20 if sampler is euler else 11
    calls, planned = (20, 8) if sampler is euler else (21, 9)
    times = [SPACINGS[spacing](1 - i / steps) for i in range(steps)]
    fast = compiled()
    for seed in range(cancelled):
        sampler(fast, noise(seed=seed), LABELS, times=times[:5])
    sampler(fast, noise(seed=8), LABELS, times=times)
    first = accel.stats(fast)
    assert first.runs == cancelled + 1
    got = sampler(fast, noise(seed=9), LABELS, times=times)
    assert accel.stats(fast).full_steps - first.full_steps == planned
    alone = compiled()
    with accel.trajectory(alone, steps=calls):
        expected = sampler(alone, noise(seed=9), LABELS, times=times)
    torch.testing.assert_close(got[-1], expected[-1])


@pytest.mark.parametrize("boundary", [9, 12, 15])
@torch.no_grad()
def test_a_run_goes_on_with_other_weights_as_a_run_of_its_own(boundary: int) -> None:
    """The same steps are computed and predicted as by another model that begins there."""
    models = dit(2), dit(2)
    before, after = (torch.compile(model, backend="accel", options=OPTIONS) for model in models)
    times = [1 - i / 20 for i in range(20)]

    def steps(model: Any, state: Tensor, part: list[float]) -> Tensor:
        for time in part:
            timestep = torch.full((len(state),), time * 1000)
            output = model(state, timestep=timestep, class_labels=LABELS, return_dict=False)[0]
            state = state - 0.05 * 0.3 * output
        return state

    change(models[1])
    middle = steps(before, noise(), times[:boundary])
    computed = accel.stats(before).full_steps
    change(models[0])
    got = steps(before, middle, times[boundary:])
    assert accel.stats(before).weight_changes == 1
    with accel.trajectory(after, steps=20 - boundary):
        expected = steps(after, middle, times[boundary:])
    assert accel.stats(before).full_steps - computed == accel.stats(after).full_steps
    torch.testing.assert_close(got, expected)


def change(model: Any) -> None:
    """Other weights in the blocks."""
    for name, weight in model.named_parameters():
        if "transformer_blocks" in name and weight.dim() == 2:
            generator = torch.Generator().manual_seed(weight.numel())
            weight.add_(weight.std() * torch.randn(weight.shape, generator=generator))
