"""OmniSparse attention on a CPU: torch's own flash attention on gathered keys, tile by tile.

A tile of queries meets sets of keys that lie together in memory, its neighbourhood and the selected
keys on either side of it, and the results are merged by their log-sum-exp. The backward pass of
flash attention asks for a result and its log-sum-exp only to weigh gradients, so with the merged
ones each set gets its share.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .selection import TILE, Selection

__all__ = ["backward", "forward"]

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass(frozen=True)
class _Tile:
    """Queries [first, last) and what they meet: keys [start, stop), and selected keys beyond."""

    first: int
    last: int
    start: int
    stop: int
    bias: Tensor | None  # [last - first, stop - start], where attention is causal
    before: list[list[int]]  # [B][G]: of the selected keys, this many lie before `start`,
    after: list[list[int]]  # and those from here on lie at `stop` or behind it.


def _tiles(
    selection: Selection, queries: int, is_causal: bool, window: int, dtype: torch.dtype
) -> Iterator[_Tile]:
    count, keys = int(selection.budget), selection.keys.shape[-1]
    selected = selection.keys[..., :count].contiguous()
    offset = keys - queries
    firsts = range(offset // TILE * TILE, keys, TILE)
    starts = [max(first - window, 0) for first in firsts]
    stops = [min(first + TILE + (0 if is_causal else window), keys) for first in firsts]
    borders = torch.tensor([*starts, *stops], dtype=torch.int32)
    places = torch.searchsorted(selected, borders.expand(*selected.shape[:2], -1).contiguous())
    before, after = places.permute(2, 0, 1).chunk(2)
    for index, (tile, start, stop) in enumerate(zip(firsts, starts, stops, strict=True)):
        first, last = max(tile, offset), min(tile + TILE, keys)
        bias = None
        if is_causal:
            bias = torch.full((last - first, stop - start), -torch.inf, dtype=dtype)
            bias = bias.triu(first - start + 1)
        ends = torch.full_like(after[index], count) if is_causal else after[index]
        yield _Tile(first - offset, last - offset, start, stop, bias,
                    before[index].tolist(), ends.tolist())  # fmt: skip


def _far(
    selection: Selection, tile: _Tile, batch: int, group: int, sinks: int
) -> Iterator[tuple[Tensor | slice, slice]]:
    """Rows of a tile, and ranges of the selected keys that they meet."""
    count = int(selection.budget)
    before, after = tile.before[batch][group], tile.after[batch][group]
    active = selection.active[batch, group, tile.first : tile.last]
    rows: Tensor | slice = slice(None) if active.all() else active.nonzero()[:, 0]
    for keys in (slice(0, before), slice(after, count)):
        if keys.start < keys.stop and active.any():
            yield rows, keys
    few = min(sinks, before)
    if few and not active.all():
        yield (~active).nonzero()[:, 0], slice(0, few)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    is_causal: bool,
    scale: float,
    window: int,
    sinks: int,
) -> tuple[Tensor, Tensor]:
    """Attention [B, H, N, D] and its log-sum-exp [B, H, N] (float32, float64 for float64)."""
    batch, heads, queries, width = query.shape
    groups = key.shape[1]
    group = heads // groups
    if _is_everything(selection, queries, is_causal):
        key, value = (each.repeat_interleave(group, 1) for each in (key, value))
        result, logsumexp = _flash(query, key, value, 0.0, is_causal, scale=scale)
        # Flash attention's layout varies; the operator promises one.
        return result.transpose(1, 2).contiguous().transpose(1, 2), logsumexp.contiguous()
    exact = torch.promote_types(query.dtype, torch.float32)
    output = torch.empty(batch, queries, heads, width, dtype=query.dtype).transpose(1, 2)
    total = torch.empty(batch, heads, queries, dtype=exact)
    key_far, value_far = _selected(key, selection), _selected(value, selection)
    for tile in _tiles(selection, queries, is_causal, window, query.dtype):
        rows = tile.last - tile.first
        shape = (batch, groups, group * rows, width)
        some = query[:, :, tile.first : tile.last].reshape(shape)
        near = slice(tile.start, tile.stop)
        bias = None if tile.bias is None else tile.bias.repeat(group, 1)
        result, logsumexp = _flash(
            some, key[:, :, near], value[:, :, near], 0.0, False, attn_mask=bias, scale=scale
        )
        result = result.reshape(batch, groups, group, rows, width).to(exact)
        logsumexp = logsumexp.reshape(batch, groups, group, rows).to(exact)
        some = some.reshape(result.shape)
        for b in range(batch):
            for g in range(groups):
                for which, keys in _far(selection, tile, b, g, sinks):
                    part = some[b, g][:, which]
                    far, far_total = _flash(
                        part.reshape(1, 1, -1, width),
                        key_far[None, None, b, g, keys],
                        value_far[None, None, b, g, keys],
                        0.0, False, scale=scale,
                    )  # fmt: skip
                    far_total = far_total.reshape(part.shape[:-1]).to(exact)
                    both = torch.logaddexp(logsumexp[b, g][:, which], far_total)
                    result[b, g][:, which] = (
                        result[b, g][:, which] * (logsumexp[b, g][:, which] - both).exp()[..., None]
                        + far.reshape(part.shape) * (far_total - both).exp()[..., None]
                    )
                    logsumexp[b, g][:, which] = both
        output[:, :, tile.first : tile.last] = result.flatten(1, 2)
        total[:, :, tile.first : tile.last] = logsumexp.flatten(1, 2)
    return output, total


def backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    total: Tensor,
    selection: Selection,
    is_causal: bool,
    scale: float,
    window: int,
    sinks: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward`'s first result with respect to query, key and value."""
    batch, heads, queries, width = query.shape
    groups = key.shape[1]
    group = heads // groups
    if _is_everything(selection, queries, is_causal):
        repeated = [each.repeat_interleave(group, 1) for each in (key, value)]
        parts = _flash_backward(
            gradient, query, *repeated, output, total, 0.0, is_causal, scale=scale
        )
        shared = (each.unflatten(1, (groups, group)).sum(2).contiguous() for each in parts[1:])
        return parts[0].contiguous(), *shared
    exact = torch.promote_types(query.dtype, torch.float32)
    key_far, value_far = _selected(key, selection), _selected(value, selection)
    grad_query = torch.empty(batch, groups, group, queries, width, dtype=query.dtype)
    grad_key, grad_value = (torch.zeros(each.shape, dtype=exact) for each in (key, value))
    far_key, far_value = (torch.zeros(each.shape, dtype=exact) for each in (key_far, value_far))
    for tile in _tiles(selection, queries, is_causal, window, query.dtype):
        rows = tile.last - tile.first
        near = slice(tile.start, tile.stop)
        own = [
            each[:, :, tile.first : tile.last].reshape(batch, groups, group, rows, width)
            for each in (gradient, query, output)
        ]
        logsumexp = total[:, :, tile.first : tile.last].reshape(batch, groups, group, rows)
        flat = [each.flatten(2, 3) for each in own]
        bias = None if tile.bias is None else tile.bias.repeat(group, 1)
        parts = _flash_backward(
            flat[0], flat[1], key[:, :, near], value[:, :, near], flat[2], logsumexp.flatten(2, 3),
            0.0, False, attn_mask=bias, scale=scale,
        )  # fmt: skip
        own_gradient = parts[0].reshape(own[1].shape).to(exact)
        grad_key[:, :, near] += parts[1]
        grad_value[:, :, near] += parts[2]
        for b in range(batch):
            for g in range(groups):
                for which, keys in _far(selection, tile, b, g, sinks):
                    some = [each[b, g][:, which].reshape(1, 1, -1, width) for each in own]
                    parts = _flash_backward(
                        some[0], some[1],
                        key_far[None, None, b, g, keys], value_far[None, None, b, g, keys],
                        some[2], logsumexp[b, g][:, which].reshape(1, 1, -1),
                        0.0, False, scale=scale,
                    )  # fmt: skip
                    own_gradient[b, g][:, which] += parts[0].reshape(group, -1, width)
                    far_key[b, g, keys] += parts[1][0, 0]
                    far_value[b, g, keys] += parts[2][0, 0]
        grad_query[:, :, :, tile.first : tile.last] = own_gradient
    place = _places(selection, width)
    grad_key.scatter_add_(2, place, far_key)
    grad_value.scatter_add_(2, place, far_value)
    return grad_query.flatten(1, 2), grad_key.to(key.dtype), grad_value.to(value.dtype)


def _is_everything(selection: Selection, queries: int, is_causal: bool) -> bool:
    """Whether one call of flash attention will do. Its causality counts from the first key."""
    keys = selection.keys.shape[-1]
    aligned = not is_causal or queries == keys
    return aligned and int(selection.budget) == keys and bool(selection.active.all())


def _places(selection: Selection, width: int) -> Tensor:
    selected = selection.keys[..., : int(selection.budget)].long()
    return selected[..., None].expand(-1, -1, -1, width)


def _selected(tensor: Tensor, selection: Selection) -> Tensor:
    """Rows of the selected keys, one after the other in memory: [B, G, count, D]."""
    return tensor.gather(2, _places(selection, tensor.shape[-1]))
