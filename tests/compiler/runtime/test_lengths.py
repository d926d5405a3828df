"""A run is as long as the one before that began alike, however its times are spaced."""

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


def compiled() -> Any:
    # Random weights predict badly; what is tested is which steps are predicted.
    options = {"lowering": "eager", "pade": {"max_error": 1e9}}
    return torch.compile(dit(2), backend="accel", fullgraph=True, options=options)


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
