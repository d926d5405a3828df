"""The models that the bench measures on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import model as fashion

__all__ = ["SUBJECTS", "TUNING_SEED", "Subject", "final"]

TUNING_SEED = 999


@dataclass(frozen=True)
class Subject:
    """A model, and how much is spent on it.

    shape: one sample's. tuning: samples to tune on, with noise of their own. samples, seeds: to
        measure on.
    placements: how many to try for each method, besides accel's own. sweeps: how often every step
        of the best one is moved by one (in runs of 20).
    settings: the most settings tried for a cache that chooses its steps itself.
    """

    name: str
    load: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tuning: int
    samples: int
    seeds: int
    placements: int
    sweeps: int
    settings: int

    def noise(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Noise and class labels of `count` samples."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, *self.shape, generator=generator), torch.arange(count) % 10


def random_dit_b2(side: int = 16) -> nn.Module:
    """diffusers' DiT in the size B/2 with random weights. side: of the latents."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    network: Any = DiTTransformer2DModel(
        num_attention_heads=12,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        num_layers=12,
        sample_size=side,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    return network.eval()


SUBJECTS = {
    "reference": Subject(
        "reference", fashion.load, (1, 28, 28),
        tuning=16, samples=64, seeds=3, placements=11, sweeps=1, settings=54,
    ),
    # Large and untrained: what it costs is telling, what it predicts hardly.
    "random-dit-b2": Subject(
        "random-dit-b2", random_dit_b2, (4, 16, 16),
        tuning=1, samples=2, seeds=1, placements=1, sweeps=0, settings=6,
    ),
}  # fmt: skip


def final(call: Any, noise: Tensor, labels: Tensor, steps: int) -> Tensor:
    """The pictures at the end of a sampling run."""
    state = noise
    for latest in fashion.sample(call, noise, labels, steps=steps):
        state = latest
    return state
