"""Samplers that put known pixels back after every step: proven in two parts."""

from __future__ import annotations

import accel
import pytest
import torch
from accel.compiler.runtime.blends import put_back
from accel.compiler.runtime.provenance import rounding
from accel.tests.models import dit, noise, relative
from torch import Tensor, nn

from .test_runs import compiled, forget, guided

STEPS = 14
ERROR = rounding(torch.float32)


def rectangle(top: int, left: int, side: int) -> Tensor:
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., top : top + side, left : left + side] = 1
    return mask


MASKS = {
    "left": rectangle(0, 0, 5), "right": rectangle(3, 4, 4), "inside left": rectangle(1, 1, 4),
    "across both": rectangle(2, 2, 5),
}  # fmt: skip


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_what_is_put_back_is_found(share: float) -> None:
    """And nothing else: the rest is a combination of four things, and of other factors."""
    generator = torch.Generator().manual_seed(0)
    picture, grain, one, other = torch.randn(4, 2048, generator=generator)
    inside = torch.arange(2048) < 2048 * share

    def sample(time: float, rest: Tensor) -> Tensor:
        return torch.where(inside, (1 - time) * picture + time * grain, rest)

    earlier = [sample(0.8, one), sample(0.7, 0.9 * one + 0.3 * other)]
    now = sample(0.6, 0.8 * one + 0.5 * other + 0.1 * grain)
    found = put_back(now.double(), torch.stack(earlier[::-1], -1).double(), ERROR)
    assert found is not None
    # What is elsewhere explained by chance is of no account.
    assert bool((found >= inside).all())
    assert int((found & ~inside).sum()) < 5


def test_a_sampler_s_step_is_no_blend() -> None:
    """Noise, and too little to look at."""
    generator = torch.Generator().manual_seed(0)
    target, *samples = torch.randn(3, 2048, generator=generator).double()
    found = put_back(target, torch.stack(samples, -1), ERROR)
    assert found is None or int(found.sum()) < 12
    assert put_back(target, samples[0][:, None], ERROR) is None
    assert put_back(target[:8], torch.stack(samples, -1)[:8], ERROR) is None


@torch.no_grad()
def painted(model: nn.Module, names: list[str], weight: float = 2.0) -> list[Tensor]:
    """Runs that take turns, of one picture, one noise and one prompt."""
    clean, grain = noise(1, seed=50), noise(1, seed=1)
    velocity = guided(model, 3, fused=False)
    states = [grain.clone() for _ in names]
    for step in range(STEPS):
        time, after = 1 - step / STEPS, 1 - (step + 1) / STEPS
        for index, name in enumerate(names):
            moved = states[index] - 0.3 / STEPS * velocity(states[index], time, weight)
            states[index] = torch.where(MASKS[name] > 0, moved, (1 - after) * clean + after * grain)
    return states


def test_masks_beside_each_other_are_what_they_are_alone() -> None:
    plain = dit(2)
    exact = painted(plain, list(MASKS))
    fast = compiled(plain)
    together = painted(fast, list(MASKS))
    stats = accel.stats(fast)
    assert stats.predicted_steps > len(MASKS) * 2 * 4
    errors = []
    for (name, mask), got, expected in zip(MASKS.items(), together, exact, strict=True):
        forget(plain)
        (alone,) = painted(fast, [name])
        # Not always the same steps are computed: a run beside others may be proven a step later.
        errors.append(
            (relative(got * mask, expected * mask), relative(alone * mask, expected * mask))
        )
    usual = max(alone for _, alone in errors)
    assert all(0 < beside < 1.3 * usual for beside, _ in errors), errors
