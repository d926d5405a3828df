"""The small video model: frames of games become tokens of a frozen SmolLM2 by a projector.

We trained the projector only (`train.py`), 0.26 million weights, to name the games that a video
shows in their order. It is no general video model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...compiler.extras import optional
from .games import PATCHES, WIDTH

__all__ = ["CHECKPOINT", "QUESTION", "Projector", "answer_of", "load_projector"]

CHECKPOINT = Path(__file__).parent / "projector.safetensors"
QUESTION = "\nThe games of this video, in the order in which they are shown:"


class Projector(nn.Module):
    """Patches of frames to embeddings: a small network, a place within the frame, and learned
    tokens before and after the video."""

    def __init__(self, width: int = 576, hidden: int = 256, around: int = 8) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, hidden)
        self.outer = nn.Linear(hidden, width)
        self.place = nn.Parameter(torch.zeros(PATCHES, width))
        self.before = nn.Parameter(0.1 * torch.randn(around, width))
        self.after = nn.Parameter(0.1 * torch.randn(around, width))

    def forward(self, patches: Tensor) -> Tensor:
        """uint8 [frames, PATCHES, WIDTH] to [tokens, width]."""
        pixels = patches.float() / 127.5 - 1
        tokens = self.outer(nn.functional.gelu(self.inner(pixels))) + self.place
        return torch.cat([self.before, tokens.flatten(0, 1), self.after])


def load_projector() -> Projector:
    """The trained one."""
    projector = Projector()
    weights = optional("safetensors.torch", "examples").load_file(CHECKPOINT)
    projector.load_state_dict({name: each.float() for name, each in weights.items()})
    return projector.eval()


def answer_of(scenes: list[str], tokenizer: Any) -> Tensor:
    """What the model is to say of a video: int64 [tokens]."""
    ids: Tensor = tokenizer(" " + ", ".join(scenes) + ".\n", return_tensors="pt").input_ids[0]
    return ids
