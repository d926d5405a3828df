"""A Wan: short clips, words by cross-attention, flow matching by UniPC, guidance in two calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .base import Data, Form, Generator, Network
from .captions import SIDE, clips

FRAMES = 4
WIDTH = 64  # of a word


class Wan(Generator):
    name = "wan"
    what = "Wan, 8 blocks, 4 frames; games by name; guidance in two calls; flow, UniPC"
    shape = (3, FRAMES, SIDE, SIDE)
    guidance = 2.0
    form = Form.TWO_CALLS
    zeroed = (
        "condition_embedder.time_proj.*", "blocks.*.scale_shift_table", "*attn2.to_out.0.*",
        "proj_out.*",
    )  # fmt: skip
    batch = 16
    steps = 1000

    def data(self, source: Path | None) -> Data:
        return clips(FRAMES)

    def build(self, words: int) -> Network:
        from diffusers import WanTransformer3DModel

        transformer: Any = WanTransformer3DModel(
            patch_size=(1, 4, 4),
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=3,
            out_channels=3,
            text_dim=WIDTH,
            ffn_dim=512,
            num_layers=8,
        )
        return Network(transformer, words, WIDTH)

    def scheduler(self, steps: int) -> Any:
        from diffusers import UniPCMultistepScheduler

        scheduler: Any = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
        scheduler.set_timesteps(steps)
        return scheduler
