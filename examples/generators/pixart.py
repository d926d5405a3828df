"""A PixArt: captions by cross-attention, its noise predicted, DPM-Solver++ of second order."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from .base import PADDING, Data, Generator, Network
from .captions import described_fashion

WIDTH = 64  # of a word


class PixArt(Generator):
    name = "pixart"
    what = "PixArt, 10 blocks, cross-attention; described clothes; fused guidance; DPM++ 2M"
    shape = (1, 28, 28)
    guidance = 1.5
    steps = 1000
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

    def embed(self, network: Network, conditions: Tensor) -> dict[str, Tensor]:
        mask = (conditions != PADDING).float()
        return {**super().embed(network, conditions), "encoder_attention_mask": mask}

    @cached_property
    def noising(self) -> Any:
        from diffusers import DDPMScheduler

        return DDPMScheduler()

    def scheduler(self, steps: int) -> Any:
        from diffusers import DPMSolverMultistepScheduler

        scheduler: Any = DPMSolverMultistepScheduler()
        scheduler.set_timesteps(steps)
        return scheduler
