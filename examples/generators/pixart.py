"""A PixArt: captions by cross-attention, its noise predicted, DPM-Solver++ of second order."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base import NOTHING, PADDING, Data, Generator, Network
from .captions import described_fashion
from .processes import corrupt_by_scheduler

WIDTH = 64  # of a word


class PixArt(Generator):
    name = "pixart"
    what = "PixArt, 10 blocks, cross-attention; described clothes; fused guidance; DPM++ 2M"
    shape = (1, 28, 28)
    guidance = 3.0
    zeroed = (
        "adaln_single.linear.*", "transformer_blocks.*.scale_shift_table", "*attn2.to_out.0.*",
        "proj_out.*",
    )  # fmt: skip

    def data(self, source: Path | None) -> Data:
        return described_fashion()

    def build(self, words: int) -> Network:
        from diffusers import PixArtTransformer2DModel

        transformer: Any = PixArtTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=1,
            out_channels=1,
            num_layers=10,
            cross_attention_dim=128,
            sample_size=28,
            patch_size=4,
            caption_channels=WIDTH,
            interpolation_scale=1,
        )
        return Network(transformer, words, WIDTH)

    def nothing(self, conditions: Tensor) -> Tensor:
        empty = torch.full_like(conditions, PADDING)
        empty[:, 0] = NOTHING
        return empty

    def embed(self, network: Network, conditions: Tensor) -> dict[str, Tensor]:
        assert network.words is not None
        return {
            "encoder_hidden_states": network.words(conditions),
            "encoder_attention_mask": (conditions != PADDING).float(),
        }

    def predict(
        self,
        transformer: Callable[..., Any],
        sample: Tensor,
        timestep: Tensor,
        told: dict[str, Tensor],
        guidance: Tensor | None = None,
    ) -> Tensor:
        output: Tensor = transformer(
            sample,
            **told,
            timestep=timestep,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return output

    @cached_property
    def noising(self) -> Any:
        """The noise it is trained with."""
        from diffusers import DDPMScheduler

        return DDPMScheduler()

    def corrupt(self, clean: Tensor, noise: Tensor, draw: torch.Generator) -> tuple[Tensor, ...]:
        return corrupt_by_scheduler(self.noising, clean, noise, draw)

    def scheduler(self, steps: int) -> Any:
        from diffusers import DPMSolverMultistepScheduler

        scheduler: Any = DPMSolverMultistepScheduler()
        scheduler.set_timesteps(steps)
        return scheduler
