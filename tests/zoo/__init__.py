"""Tiny configurations of diffusers' transformer classes, for tests that compile each of them.

Every entry is the real class with a few narrow blocks and a handful of tokens, so that building it
and running it once takes a fraction of a second on one CPU core. All entries are captured as one
graph by `torch.compile(fullgraph=True)`; classes that are not are named in `NOT_CAPTURED`.
"""

from __future__ import annotations

from .image import IMAGE
from .other import OTHER
from .parts import Entry
from .video import VIDEO

__all__ = ["ENTRIES", "NOT_CAPTURED", "TIME_INDEPENDENT", "Entry"]

ENTRIES: dict[str, Entry] = {entry.class_name: entry for entry in [*IMAGE, *VIDEO, *OTHER]}

# They accept a timestep and do not use it in these configurations.
TIME_INDEPENDENT: frozenset[str] = frozenset(
    {"DreamLiteTransformer2DModel", "DualTransformer2DModel", "TransformerTemporalModel"}
)

NOT_CAPTURED: dict[str, str] = {
    "HunyuanVideo15Transformer3DModel": "branches on whether the image embeddings are all zeros",
    "Lumina2Transformer2DModel": "reads the lengths of the prompts from the mask",
    "OmniGenTransformer2DModel": "branches on the largest position id",
    "QwenImage21Transformer2DModel": "reads the layout of the tokens from a mask (tolist)",
    "WanAnimate2Transformer3DModel": "reads the size of the grid from a tensor (item, tolist)",
}
