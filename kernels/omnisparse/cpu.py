"""OmniSparse attention on a CPU: torch's own flash attention on gathered keys, block by block.

A block of queries meets pieces of keys that lie together in memory (its neighbourhood, the selected
keys on either side of it, or simply all keys), and the results are merged by their log-sum-exp. The
backward pass of flash attention asks for a result and its log-sum-exp only to weigh gradients, so
with the merged ones each piece gets its share.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .selection import EXACT, TILE, active_queries, segment_length

__all__ = ["backward", "forward"]

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

ACTIVE_AT_ONCE = 128  # active queries that meet all keys together


class _Block(NamedTuple):
    """Queries of one head group [H / G, N], by an index into it, and the keys that they meet.

    pieces: places of keys [M], and what is added to the scores there, [queries, keys] or None.
    """

    queries: tuple[Any, Any]
    pieces: list[tuple[slice | Tensor, Tensor | None]]


class _Layout(NamedTuple):
    """Where queries and keys are. offset: the first query's position."""

    queries: int
    keys: int
    offset: int
    group: int  # query heads that share a key head
    is_causal: bool
    dtype: torch.dtype

    @staticmethod
    def of(query: Tensor, key: Tensor, is_causal: bool) -> _Layout:
        queries, keys = query.shape[2], key.shape[2]
        group = query.shape[1] // key.shape[1]
        return _Layout(queries, keys, keys - queries, group, is_causal, query.dtype)

    def bias(self, position: Tensor, place: slice, valid: Tensor | None) -> Tensor | None:
        """What hides later keys and padding from queries; None where nothing does."""
        hidden = None
        if self.is_causal and place.stop > int(position[0]) + 1:
            hidden = torch.arange(place.start, place.stop) > position[:, None]
        if valid is not None:
            padding = ~valid[place]
            hidden = padding.expand(len(position), -1) if hidden is None else hidden | padding
        if hidden is None:
            return None
        return torch.zeros(hidden.shape, dtype=self.dtype).masked_fill_(hidden, -torch.inf)


def _lazy(
    layout: _Layout, keys: Tensor, budgets: list[int], valid: Tensor | None, window: int
) -> Iterator[_Block]:
    """All queries, tile by tile. keys: [S, M], the selected ones of one key head; valid: [M]."""
    length = segment_length(layout.keys)
    biases: dict[tuple[int, int, int], Tensor | None] = {}
    for tile in range(layout.offset // TILE * TILE, layout.keys, TILE):
        first, last = max(tile, layout.offset), min(tile + TILE, layout.keys)
        budget = budgets[tile // length]
        start = max(tile - window, 0)
        stop = last if layout.is_causal else min(tile + TILE + window, layout.keys)
        form = first - start, last - start, stop - start
        if valid is not None or form not in biases:
            position = torch.arange(first, last).repeat(layout.group)
            biases[form] = layout.bias(position, slice(start, stop), valid)
        pieces: list[tuple[slice | Tensor, Tensor | None]] = [(slice(start, stop), biases[form])]
        far: list[slice | Tensor]
        if budget == EXACT:
            far = [slice(0, start), slice(stop, layout.keys)]
        else:
            selected = keys[tile // length, :budget].long()
            before, behind = torch.searchsorted(selected, torch.tensor([start, stop])).tolist()
            far = [selected[:before], selected[behind:]]
        for place in far[: 1 if layout.is_causal else 2]:
            count = place.stop - place.start if isinstance(place, slice) else len(place)
            if count == 0:
                continue
            bias = None
            if valid is not None:
                bias = torch.zeros(count, dtype=layout.dtype)
                bias = bias.masked_fill_(~valid[place], -torch.inf)
                bias = bias.expand(layout.group * (last - first), -1)
            pieces.append((place, bias))
        rows = slice(first - layout.offset, last - layout.offset)
        yield _Block((slice(None), rows), pieces)


def _active(layout: _Layout, active: Tensor, valid: Tensor | None) -> Iterator[_Block]:
    """The active ones of a group's queries [H / G, N], in their order, with all keys."""
    for some in active.t().nonzero().split(ACTIVE_AT_ONCE):
        if not len(some):
            continue
        rows, heads = some.unbind(1)
        position = rows + layout.offset
        end = int(position[-1]) + 1 if layout.is_causal else layout.keys
        certain = int(position[0]) if layout.is_causal else end  # keys that all of them see
        places = [place for place in (slice(0, certain), slice(certain, end))
                  if place.start < place.stop]  # fmt: skip
        pieces: list[tuple[slice | Tensor, Tensor | None]] = [
            (place, layout.bias(position, place, valid)) for place in places
        ]
        yield _Block((heads, rows), pieces)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    budget: Tensor,
    valid: Tensor | None,
    is_causal: bool,
    scale: float,
    active: float,
    window: int,
    start: int,
    stop: int,
    tail: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention [B, H, N, D], its log-sum-exp [B, H, N] (float32, float64 for float64), and which
    queries were active, bool [B, H, N]. The log-sum-exp of a query that saw nothing is -inf."""
    batch, heads, queries, _ = query.shape
    layout = _Layout.of(query, key, is_causal)
    if _is_everything(layout, budget, valid):
        key, value = (each.repeat_interleave(layout.group, 1) for each in (key, value))
        result, logsumexp = _flash(query, key, value, 0.0, is_causal, scale=scale)
        total = logsumexp.contiguous()
        return result.contiguous(), total, torch.zeros_like(total, dtype=torch.bool)
    exact = torch.promote_types(query.dtype, torch.float32)
    output = torch.empty(query.shape, dtype=query.dtype)
    total = torch.empty(batch, heads, queries, dtype=exact)
    for b, g, own in _groups(query, key, value, output, total):
        some = None if valid is None else valid[b]
        for block in _lazy(layout, keys[b, g], budget[b].tolist(), some, window):
            _attend(*own, block, scale)
    chosen = active_queries(query, key, valid, total, budget, is_causal, scale,
                            active, window, start, stop, tail)  # fmt: skip
    for b, g, own in _groups(query, key, value, output, total):
        mine = chosen[b].unflatten(0, (-1, layout.group))[g]
        for block in _active(layout, mine, None if valid is None else valid[b]):
            _attend(*own, block, scale)
    return output, total, chosen


def _groups(*tensors: Tensor) -> Iterator[tuple[int, int, list[Tensor]]]:
    """For each sample and key head: what of each tensor belongs to it.

    tensors: [B, H, ...], which gives [H / G, ...], or [B, G, ...], which gives [...]. The second is
    the key.
    """
    batch, groups = tensors[1].shape[:2]
    together = [each if index in (1, 2) else each.unflatten(1, (groups, -1))
                for index, each in enumerate(tensors)]  # fmt: skip
    for b in range(batch):
        for g in range(groups):
            yield b, g, [each[b, g] for each in together]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, total: Tensor, block: _Block,
    scale: float,
) -> None:  # fmt: skip
    """Write the block's part of `output` and `total`."""
    place = output[block.queries]
    some = query[block.queries].reshape(1, 1, -1, query.shape[-1])
    merged, logsumexp = None, None
    for keys, bias in block.pieces:
        part, seen = _flash(
            some, key[keys][None, None], value[keys][None, None], 0.0, False,
            attn_mask=bias, scale=scale,
        )  # fmt: skip
        part, seen = part[0, 0].to(total.dtype), seen[0, 0].to(total.dtype)
        if bias is not None:  # flash attention says 0 of a query that saw nothing
            seen = seen.masked_fill((bias == -torch.inf).all(-1), -torch.inf)
        if merged is None or logsumexp is None:
            merged, logsumexp = part, seen
            continue
        both = torch.logaddexp(logsumexp, seen).clamp(min=torch.finfo(total.dtype).min)
        merged = merged * (logsumexp - both).exp()[:, None] + part * (seen - both).exp()[:, None]
        logsumexp = torch.logaddexp(logsumexp, seen)
    assert merged is not None
    assert logsumexp is not None
    output[block.queries] = merged.to(output.dtype).reshape(place.shape)
    total[block.queries] = logsumexp.reshape(place.shape[:-1])


def backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    total: Tensor,
    keys: Tensor,
    budget: Tensor,
    active: Tensor,
    valid: Tensor | None,
    is_causal: bool,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward`'s first result with respect to query, key and value."""
    layout = _Layout.of(query, key, is_causal)
    if _is_everything(layout, budget, valid):
        repeated = [each.repeat_interleave(layout.group, 1) for each in (key, value)]
        parts = _flash_backward(
            gradient, query, *repeated, output, total, 0.0, is_causal, scale=scale
        )
        shared = (each.unflatten(1, (key.shape[1], -1)).sum(2).contiguous() for each in parts[1:])
        return parts[0].contiguous(), *shared
    gradients = [torch.zeros(each.shape, dtype=total.dtype) for each in (query, key, value)]
    total = total.masked_fill(total == -torch.inf, torch.inf)  # weighs all scores with 0
    lazily = total.masked_fill(active, torch.inf)
    for b, g, own in _groups(query, key, value, gradient, output, lazily, total, gradients[0]):
        mine = active[b].unflatten(0, (-1, layout.group))[g]
        some = None if valid is None else valid[b]
        *data, lazy_total, full_total, grad_query = own
        into = grad_query, gradients[1][b, g], gradients[2][b, g]
        for block in _lazy(layout, keys[b, g], budget[b].tolist(), some, window):
            _differentiate(*data, lazy_total, into, block, scale)
        for block in _active(layout, mine, some):
            _differentiate(*data, full_total, into, block, scale)
    grad_query, grad_key, grad_value = (each.to(query.dtype) for each in gradients)
    return grad_query, grad_key, grad_value


def _differentiate(
    query: Tensor, key: Tensor, value: Tensor, gradient: Tensor, output: Tensor, total: Tensor,
    into: tuple[Tensor, Tensor, Tensor], block: _Block, scale: float,
) -> None:  # fmt: skip
    """Add a block's part of the gradients of query, key and value."""
    grad_query, grad_key, grad_value = into
    some, up, result = (
        each[block.queries].reshape(1, 1, -1, query.shape[-1]) for each in (query, gradient, output)
    )
    seen = total[block.queries].reshape(1, 1, -1)
    for keys, bias in block.pieces:
        parts = _flash_backward(
            up, some, key[keys][None, None], value[keys][None, None], result, seen, 0.0, False,
            attn_mask=bias, scale=scale,
        )  # fmt: skip
        grad_query[block.queries] += parts[0].reshape(grad_query[block.queries].shape)
        grad_key[keys] += parts[1][0, 0]  # no key is in a piece twice
        grad_value[keys] += parts[2][0, 0]


def _is_everything(layout: _Layout, budget: Tensor, valid: Tensor | None) -> bool:
    """Whether one call of flash attention will do. Its causality counts from the first key."""
    aligned = not layout.is_causal or layout.offset == 0
    own = budget[:, max(layout.offset, 0) // segment_length(layout.keys) :]
    return valid is None and aligned and bool((own == EXACT).all())
