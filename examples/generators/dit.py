"""A DiT whose velocity is predicted (Salimans & Ho 2022), sampled by DDIM."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .base import Data, Generator, Network
from .captions import SIDE, emoji

CATEGORIES = 10


class Dit(Generator):
    name = "dit"
    what = "DiT, 10 blocks, v-prediction; emoji by category; fused guidance; DDIM"
    shape = (3, SIDE, SIDE)
    guidance = 2.0
    steps = 1000
    zeroed = ("*norm1.linear.*", "proj_out_1.*", "proj_out_2.*")

    def data(self, source: Path | None) -> Data:
        return emoji(source, by_category=True)

    def build(self, words: int) -> Network:
        from diffusers import DiTTransformer2DModel

        transformer: Any = DiTTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=3,
            out_channels=3,
            num_layers=10,
            sample_size=SIDE,
            patch_size=4,
            num_embeds_ada_norm=CATEGORIES,
        )
        return Network(transformer)

    def nothing(self, conditions: Tensor) -> Tensor:
        return torch.full_like(conditions, CATEGORIES)

    def embed(self, network: Network, conditions: Tensor) -> dict[str, Tensor]:
        return {"class_labels": conditions[:, 0]}

    @cached_property
    def noising(self) -> Any:
        from diffusers import DDIMScheduler

        return DDIMScheduler(
            beta_schedule="squaredcos_cap_v2",
            prediction_type="v_prediction",
            clip_sample=False,
            timestep_spacing="trailing",
            rescale_betas_zero_snr=True,
        )

    def scheduler(self, steps: int) -> Any:
        scheduler = type(self.noising).from_config(self.noising.config)
        scheduler.set_timesteps(steps)
        return scheduler
