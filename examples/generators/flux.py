"""A Flux: double and single blocks, guidance as an input, flow matching by Euler steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base import Data, Form, Generator, Network
from .captions import SIDE, emoji

PATCH = 4
GRID = SIDE // PATCH
WIDTH = 64  # of a word


def packed(sample: Tensor) -> Tensor:
    """Pictures `[batch, 3, 32, 32]` as tokens `[batch, 64, 48]`."""
    parts = sample.unflatten(3, (GRID, PATCH)).unflatten(2, (GRID, PATCH))
    return parts.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpacked(tokens: Tensor) -> Tensor:
    """The inverse of `packed`."""
    parts = tokens.unflatten(2, (3, PATCH, PATCH)).unflatten(1, (GRID, GRID))
    return parts.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


class Flux(Generator):
    name = "flux"
    what = "Flux, 3 double and 6 single blocks; emoji by name; guidance embedded; flow, Euler"
    shape = (3, SIDE, SIDE)
    guidance = 2.5
    form = Form.EMBEDDED
    zeroed = (
        "*norm1.linear.*", "*norm1_context.linear.*", "*.norm.linear.*", "norm_out.linear.*",
        "proj_out.*",
    )  # fmt: skip
    distilled = 0.75

    def data(self, source: Path | None) -> Data:
        return emoji(source, by_category=False)

    def build(self, words: int) -> Network:
        from diffusers import FluxTransformer2DModel

        transformer: Any = FluxTransformer2DModel(
            in_channels=3 * PATCH * PATCH,
            num_layers=3,
            num_single_layers=6,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(8, 12, 12),
        )
        return Network(transformer, words, WIDTH)

    def embed(self, network: Network, conditions: Tensor) -> dict[str, Tensor]:
        told = super().embed(network, conditions)
        return {**told, "pooled_projections": told["encoder_hidden_states"].mean(1)}

    def predict(
        self,
        transformer: Callable[..., Any],
        sample: Tensor,
        timestep: Tensor,
        told: dict[str, Tensor],
    ) -> Tensor:
        places = torch.zeros(GRID, GRID, 3)
        places[..., 1] += torch.arange(GRID)[:, None]
        places[..., 2] += torch.arange(GRID)
        more = {
            "guidance": torch.ones_like(timestep),
            "img_ids": places.flatten(0, 1),
            "txt_ids": torch.zeros(told["encoder_hidden_states"].shape[1], 3),
        }
        tokens = super().predict(transformer, packed(sample), timestep / 1000, {**more, **told})
        return unpacked(tokens)

    def scheduler(self, steps: int) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=1.5)
        sigmas: Any = [1 - step / steps for step in range(steps)]
        scheduler.set_timesteps(sigmas=sigmas)
        return scheduler
