"""What a fit takes for a proof: samplers' steps, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from accel.compiler.runtime.provenance import Limits, fit, limits_of, positions, rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

TYPES = (torch.float32, torch.bfloat16, torch.float16)
PLACES = 1024


def output(sample: Tensor, time: float, prompt: float) -> Tensor:
    """Of a model that is anything but linear."""
    wide = sample.float()
    mixed = torch.tanh(1.3 * wide.roll(1) - wide + prompt) + 0.3 * wide * wide.cos() + 0.3 * time
    return mixed.to(sample.dtype)


def judged(target: Tensor, basis: list[Tensor], newest: list[bool]) -> tuple[float, float]:
    """What is left of a target, with and without the newest outputs."""
    columns = torch.stack(basis, -1)[None].double()
    unused = torch.zeros(1, len(target), dtype=torch.bool)
    result = fit(target[None].double(), columns, torch.tensor([newest]), rounding(target.dtype),
                 unused)  # fmt: skip
    return float(result.left), float(result.left_without)


def proves(left: tuple[float, float], limits: Limits) -> bool:
    return left[0] <= limits.unexplained and left[1] >= limits.needed * max(left[0], 0.5)


def euler(seed: int, dtype: torch.dtype, weight: float, steps: int) -> list[list[Tensor]]:
    """A run with guidance: of each step the sample and both outputs."""
    state = torch.randn(PLACES, generator=torch.Generator().manual_seed(seed)).to(dtype)
    seen = []
    for step in range(steps):
        yes, no = (output(state, 1 - step / steps, prompt) for prompt in (0.7, -0.2))
        seen.append([state, yes, no])
        guided = no + weight * (yes - no)
        state = (state.float() - guided.float() / steps).to(dtype)
    return seen


def basis(seen: list[list[Tensor]]) -> tuple[list[Tensor], list[bool]]:
    columns = [each for step in reversed(seen[-3:]) for each in step]
    return columns, [0 < index < 3 for index in range(len(columns))]


@pytest.mark.parametrize("dtype", TYPES)
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), weight=st.floats(0.5, 9.0), steps=st.integers(6, 40),
       scale=st.sampled_from([1e-3, 1.0, 80.0]))  # fmt: skip
def test_a_step_is_proven_and_another_run_is_not(
    dtype: torch.dtype, seed: int, weight: float, steps: int, scale: float
) -> None:
    own, other = (euler(seed + n, dtype, weight, steps) for n in (0, 1))
    fork = euler(seed, dtype, 1.5 * weight + 1, steps)
    limits = limits_of(dtype)
    for step in range(1, 5):
        columns, newest = basis(own[:step])
        scaled = [(each.float() * scale).to(dtype) for each in columns]
        if scale == 1.0:
            mine = judged(own[step][0], columns, newest)
            assert mine[0] <= limits.unexplained / 1.5
            # In coarse types a smooth run's newest output may add no more than the rounding.
            assert proves(mine, limits) or (dtype != torch.float32 and mine[1] < 1.2 * mine[0])
            assert not proves(judged(other[step][0], columns, newest), limits)
            if step > 1:  # a fork is explained by the step from which it forks, and no later one
                strange, newest = judged(fork[step][0], columns, newest), basis(fork[:step])
                if dtype is torch.float32:
                    assert not proves(strange, limits)
                else:  # or, where that is hardly another, less well than by its own
                    assert judged(fork[step][0], *newest)[0] < 0.95 * strange[0]
        elif dtype is torch.float32:
            target = (own[step][0].float() * scale).to(dtype)
            assert proves(judged(target, scaled, newest), limits)


@pytest.mark.parametrize("dtype", TYPES)
def test_points_of_a_line_through_noise_prove_nothing(dtype: torch.dtype) -> None:
    """A loss at several times of one picture and noise: explained, but not by the outputs."""
    picture, noise = torch.randn(2, PLACES).unbind(0)
    seen = []
    for time in (1.0, 0.9, 0.8, 0.7):
        state = ((1 - time) * picture + time * noise).to(dtype)
        seen.append([state, output(state, time, 0.7), output(state, time, -0.2)])
    columns, newest = basis(seen[:3])
    assert not proves(judged(seen[3][0], columns, newest), limits_of(dtype))


def broken(kind: str) -> Callable[[Tensor], Tensor]:
    return {
        "nan": lambda x: torch.full_like(x, math.nan),
        "inf": lambda x: torch.cat([torch.full_like(x[:1], math.inf), x[1:]]),
        "zero": torch.zeros_like,
    }[kind]


@pytest.mark.parametrize("kind", ["nan", "inf", "zero"])
def test_broken_values_prove_nothing(kind: str) -> None:
    seen = euler(0, torch.float32, 2.0, 10)
    columns, newest = basis(seen[:3])
    change = broken(kind)
    limits = limits_of(torch.float32)
    assert not proves(judged(change(seen[3][0]), columns, newest), limits)
    assert not proves(judged(seen[3][0], [*map(change, columns)], newest), limits)
    columns[1] = change(columns[1])
    assert not proves(judged(seen[3][0], columns, newest), limits)


def test_equal_and_empty_columns_do_no_harm() -> None:
    """Branches whose outputs are the same, and runs too short for all columns."""
    seen = euler(0, torch.float32, 2.0, 10)
    columns, newest = basis(seen[:2])
    more = [*columns, columns[1], torch.zeros(PLACES), columns[0]]
    flags = [*newest, True, False, False]
    assert proves(judged(seen[2][0], more, flags), limits_of(torch.float32))


@pytest.mark.parametrize("box", [(4, 64, 64), (4096, 64), (16, 1, 8, 8), (3,), (16, 21, 90, 160)])
def test_positions_lie_all_over(box: tuple[int, ...]) -> None:
    found = positions(box, 2048)
    assert all(map(torch.equal, found, positions(box, 2048)))
    assert len(found) == len(box)
    assert len(found[0]) == min(2048, math.prod(box))
    for place, size in zip(found, box, strict=True):
        assert int(place.min()) >= 0
        assert int(place.max()) < size
        counts = torch.bincount(place, minlength=size).double()
        expected = len(place) / size
        assert float((counts - expected).abs().max()) < 6 * math.sqrt(expected) + 1
