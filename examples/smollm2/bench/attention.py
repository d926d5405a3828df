"""Running the model with another attention function, and noting what it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ....kernels.omnisparse.op import attend_with_selection
from ....kernels.omnisparse.selection import EXACT, Choice, Selection, neighbourhood, segment_length

__all__ = ["Attend", "Noted", "attention", "dense", "pairs", "sparse"]

Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # query, key, value and the layer
NAME = "accel_bench"


def dense(query: Tensor, key: Tensor, value: Tensor, layer: int = 0) -> Tensor:
    """Causal attention of all pairs: [B, H, N, D] on [B, G, N, D]."""
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


@dataclass
class Noted:
    """What the layers did, in their order. pairs: shares of the causal pairs."""

    pairs: list[float] = field(default_factory=list)
    selections: list[Selection] = field(default_factory=list)


def sparse(choice: Choice, noted: Noted | None = None) -> Attend:
    """Causal attention by our operators."""

    def attend(query: Tensor, key: Tensor, value: Tensor, layer: int = 0) -> Tensor:
        scale = query.shape[-1] ** -0.5
        output, selection, active = attend_with_selection(
            query, key, value, None, None, True, scale, choice
        )
        if noted is not None:
            noted.pairs.append(pairs(selection, active, choice.window))
            noted.selections.append(selection)
        return output

    return attend


def pairs(selection: Selection, active: Tensor, window: int) -> float:
    """The share of the causal pairs of queries and keys whose scores were computed, without those
    of the probe rows."""
    heads, count = active.shape[1:]
    position = torch.arange(count)
    budget = selection.budget[0].long()[position // segment_length(count)]
    start, stop = neighbourhood(position, count, window, True)
    lazy = torch.where(budget == EXACT, stop, stop - start + budget)
    full = active[0].sum(0)
    return float((lazy * (heads - full) + stop * full).sum() / (stop.sum() * heads))


@contextmanager
def attention(model: Any, attend: Attend) -> Iterator[None]:
    """The model's prefill by `attend`; steps that have more keys than queries stay dense."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def forward(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        **settings: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        if query.shape[2] != key.shape[2]:
            return sdpa_attention_forward(module, query, key, value, mask, **settings)
        result = attend(query, key, value, module.layer_idx)
        return result.transpose(1, 2).contiguous(), None

    before = model.config._attn_implementation
    AttentionInterface.register(NAME, forward)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
