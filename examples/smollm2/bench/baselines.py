"""Other ways to choose keys, with our kernel or FlexAttention, at a given share of the pairs.

Written anew from what their papers say: MInference's vertical-slash heads (arXiv 2407.02490) and
MoBA's blocks (arXiv 2502.13189).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ....kernels.omnisparse.selection import segment_count, segment_length
from .attention import Attend

__all__ = ["flex_blocks", "top_blocks", "vertical_slash"]

WINDOW = 128
BLOCK = 64  # keys of one of MoBA's blocks
ROWS = 64  # the last queries, by which vertical-slash chooses
FLEX = 128  # FlexAttention's blocks of queries and keys


def top_blocks(share: float) -> Attend:
    """For each segment of queries the blocks whose mean key is nearest to its mean query."""

    def scores(query: Tensor, key: Tensor) -> Tensor:
        length, count = segment_length(key.shape[2]), segment_count(key.shape[2])
        asking = _means(query.unflatten(1, (key.shape[1], -1)).mean(2), length)
        by_block = asking @ _means(key, BLOCK).transpose(-1, -2)
        return by_block.repeat_interleave(BLOCK, -1)[..., : key.shape[2]].reshape(
            *key.shape[:2], count, -1
        )

    return _with(scores, share)


def vertical_slash(share: float) -> Attend:
    """Columns and diagonals that the last queries look at; diagonals get half of the keys."""

    def scores(query: Tensor, key: Tensor) -> Tensor:
        groups, keys = key.shape[1:3]
        length, count = segment_length(keys), segment_count(keys)
        rows = query[:, :, -ROWS:].unflatten(1, (groups, -1))
        weights = rows @ key[:, :, None].transpose(-1, -2) * query.shape[-1] ** -0.5
        later = torch.arange(keys) > torch.arange(keys - ROWS, keys)[:, None]
        attention = weights.masked_fill(later, -torch.inf).softmax(-1).mean(2)  # [B, G, ROWS, M]
        column = attention.sum(2)
        offset = torch.arange(keys - ROWS, keys)[:, None] - torch.arange(keys)
        diagonal = torch.zeros_like(column).scatter_add_(
            2, offset.clamp(min=0).flatten().expand(*column.shape[:2], -1), attention.flatten(2)
        )
        found = column[:, :, None].repeat(1, 1, count, 1)
        for segment in range(1, count):
            first = segment * length
            bands = round(share * first / 2 / length)
            far = diagonal[..., length + WINDOW : first + 1]
            for shift in far.topk(min(bands, far.shape[-1])).indices.unbind(-1):
                start = first - length - WINDOW - shift
                place = (start[..., None] + torch.arange(length)).clamp(min=0)
                found[:, :, segment].scatter_(2, place, 2.0)  # more than any column
        return found

    return _with(scores, share)


def _means(tokens: Tensor, block: int) -> Tensor:
    """Of each block of tokens: [B, G, N, D] to [B, G, blocks, D]; the last one may be shorter."""
    return torch.stack([part.mean(2) for part in tokens.split(block, dim=2)], 2)


def _with(scores: Callable[[Tensor, Tensor], Tensor], share: float) -> Attend:
    """Attention to the `share` of far keys with the highest scores, [B, G, S, M]."""

    def attend(query: Tensor, key: Tensor, value: Tensor, layer: int = 0) -> Tensor:
        by_segment = scores(query, key)
        keys, length = key.shape[2], segment_length(key.shape[2])
        chosen = torch.full(by_segment.shape, keys, dtype=torch.int32)
        budget = torch.zeros(len(key), by_segment.shape[2], dtype=torch.int32)
        for segment in range(by_segment.shape[2]):
            start = max(segment * length - WINDOW, 0)
            count = round(share * start)
            budget[:, segment] = count
            best = by_segment[:, :, segment, :start].topk(count).indices
            chosen[:, :, segment, :count] = best.sort(-1).values.int()
        scale = query.shape[-1] ** -0.5
        output: Tensor = torch.ops.accel.omnisparse_attend(
            query, key, value, chosen, budget, None, None, True, scale, 0.0, WINDOW, 0, -1, 0
        )[0]
        return output

    return attend


def flex_blocks(share: float) -> Attend:
    """As `top_blocks`, each block of queries for itself, by FlexAttention under Inductor."""
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def attend(query: Tensor, key: Tensor, value: Tensor, layer: int = 0) -> Tensor:
        groups, heads = key.shape[1], query.shape[1]
        asking = _means(query.unflatten(1, (groups, -1)).mean(2), FLEX)
        scores = asking @ _means(key, FLEX).transpose(-1, -2)
        blocks = scores.shape[-1]
        number = torch.arange(blocks)
        # Its own block and the one before, as the window; the others by their scores.
        near = (number[:, None] - number).abs() <= 1
        scores = scores.masked_fill(near, torch.inf)
        scores = scores.masked_fill(number > number[:, None], -torch.inf)
        count = (2 + (share * (number - 1)).round()).clamp(min=1).minimum(number + 1)
        order = scores.argsort(-1, descending=True)
        # Ascending, and what is not used last.
        used = number < count[:, None]
        order = order.where(used, blocks).sort(-1).values.where(used, 0)
        mask = BlockMask.from_kv_blocks(
            count.int().expand(len(key), heads, -1).contiguous(),
            order.int().repeat_interleave(heads // groups, 1).contiguous(),
            BLOCK_SIZE=FLEX,
            mask_mod=_causal,
            seq_lengths=(key.shape[2], key.shape[2]),
        )
        output: Tensor = compiled(query, key, value, block_mask=mask, enable_gqa=True)
        return output

    return attend


def _causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key
