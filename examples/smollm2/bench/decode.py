"""What a slimmer cache saves in decoding, and what it changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .quality import Quality, compare

__all__ = ["slimmed"]


@torch.no_grad()
def slimmed(
    model: Any, tokens: Tensor, prompt: int, settings: dict[str, Any]
) -> tuple[float, Quality]:
    """How many times fewer bytes a SlimCache holds after a prompt of so many tokens; and the
    predictions for the tokens that follow, against those of a full cache."""
    from transformers import DynamicCache

    from ....compiler.slim_cache import SlimCache

    results, fewer = [], 1.0
    for cache in (DynamicCache(config=model.config), SlimCache(model, **settings)):
        model.model(tokens[None, :prompt], past_key_values=cache)
        if isinstance(cache, SlimCache):
            fewer = cache.full_nbytes / cache.nbytes
        following = model(tokens[None, prompt:], past_key_values=cache).logits[0]
        results.append(following.log_softmax(-1))
    return fewer, compare(results[1], results[0], tokens[prompt:])
