"""What a slimmer cache saves in decoding, and what it changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .quality import Quality, compare

__all__ = ["slimmed"]


@torch.no_grad()
def slimmed(
    model: Any, tokens: Tensor, prompt: int, settings: Sequence[dict[str, Any]]
) -> Iterator[tuple[float, Quality]]:
    """How many times fewer bytes a SlimCache holds after a prompt of so many tokens; and the
    predictions for the tokens that follow, against those of a full cache."""
    from transformers import DynamicCache

    from ....compiler.models.slim_cache import SlimCache

    def predicted(cache: Any) -> Tensor:
        model.model(tokens[None, :prompt], past_key_values=cache)
        following: Tensor = model(tokens[None, prompt:], past_key_values=cache).logits[0]
        return following.log_softmax(-1)

    wanted = predicted(DynamicCache(config=model.config))
    for setting in settings:
        cache = SlimCache(model, **setting)
        quality = compare(predicted(cache), wanted, tokens[prompt:])
        yield cache.full_nbytes / cache.nbytes, quality
