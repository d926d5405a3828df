"""What noise does to a sample, and what a network is to predict of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["corrupt_by_scheduler", "corrupt_flow"]


def _like(values: Tensor, sample: Tensor) -> Tensor:
    return values.view(-1, *[1] * (sample.ndim - 1))


def corrupt_flow(clean: Tensor, noise: Tensor, draw: torch.Generator) -> tuple[Tensor, ...]:
    """The straight line from a sample to noise; its velocity is predicted (Liu et al. 2022).

    Times are logit-normal (Esser et al. 2024, section 3.1), spread 1.2 around 0.2.
    """
    time = torch.sigmoid(torch.randn(len(clean), generator=draw) * 1.2 + 0.2)
    mix = _like(time, clean)
    return (1 - mix) * clean + mix * noise, time * 1000, noise - clean


def corrupt_by_scheduler(
    scheduler: Any, clean: Tensor, noise: Tensor, draw: torch.Generator
) -> tuple[Tensor, ...]:
    """As one of diffusers' schedulers does it: its noise, or the velocity, is predicted."""
    time = torch.randint(scheduler.config.num_train_timesteps, (len(clean),), generator=draw)
    noisy = scheduler.add_noise(clean, noise, time)
    kind = scheduler.config.prediction_type
    target = noise if kind == "epsilon" else scheduler.get_velocity(clean, noise, time)
    return noisy, time.float(), target
