"""OmniSparse attention on a CPU: torch's own flash attention on gathered keys, block by block.

A block of queries meets pieces of keys (its neighbourhood, the selected ones, or simply all of
them), and the results are merged by their log-sum-exp. The backward pass of flash attention asks
for a result and its log-sum-exp only to weigh gradients, so with the merged ones each piece gets
its share. A segment of all heads is one block, since they share a budget: flash attention is slow
on small ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from .selection import EXACT, active_queries, neighbourhood, segment_count, segment_length

__all__ = ["backward", "forward"]

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

ACTIVE_AT_ONCE = 256  # active queries that meet all keys together


class _Piece(NamedTuple):
    """Keys that a block of queries meets.

    place: [start, stop), or each key head's own, [G', keys]. bias: what is added to the scores,
    [rows or 1, keys]. hides: whether it may hide all of them from a query.
    """

    place: slice | Tensor
    bias: Tensor | None = None
    hides: bool = False


class _Block(NamedTuple):
    """Queries of one sample, and the keys that they meet.

    heads: the key heads, of which there are G'. rows: which of their queries, those of all heads of
    a group in one row of H / G * N.
    """

    heads: slice
    rows: Tensor
    pieces: list[_Piece]

    def of(self, queries: Tensor) -> Tensor:
        """Its own of [G, H / G * N, ...]: [G', rows, ...]."""
        return queries[self.heads].index_select(1, self.rows)

    def put(self, queries: Tensor, own: Tensor) -> None:
        """The reverse of `of`."""
        queries[self.heads].index_copy_(1, self.rows, own.to(queries.dtype))


class _Layout(NamedTuple):
    """Where queries and keys are. offset: the first query's position."""

    keys: int
    offset: int
    group: int  # query heads that share a key head
    window: int
    is_causal: bool
    dtype: torch.dtype

    @staticmethod
    def of(query: Tensor, key: Tensor, window: int, is_causal: bool) -> _Layout:
        keys, group = key.shape[2], query.shape[1] // key.shape[1]
        return _Layout(keys, keys - query.shape[2], group, window, is_causal, query.dtype)

    def bias(self, hidden: Tensor) -> Tensor:
        return torch.zeros(hidden.shape, dtype=self.dtype).masked_fill_(hidden, -torch.inf)

    def piece(self, place: slice, valid: Tensor | None, position: Tensor | None = None) -> _Piece:
        """position: of the queries, where not all of them see all of the keys."""
        hidden = None if valid is None else ~valid[None, place]
        if position is not None:
            later = torch.arange(place.start, place.stop) > position[:, None]
            hidden = later if hidden is None else hidden | later
        bias = None if hidden is None else self.bias(hidden)
        return _Piece(place, bias, hides=valid is not None)

    def rows(self, heads: Tensor, position: Tensor) -> Tensor:
        """As `_Block` names them."""
        return heads * (self.keys - self.offset) + position - self.offset

    def is_exact(self, budget: Tensor, valid: Tensor | None) -> bool:
        """Whether one call of flash attention will do. Its causality counts from the first key."""
        aligned = not self.is_causal or self.offset == 0
        own = budget[:, max(self.offset, 0) // segment_length(self.keys) :]
        return valid is None and aligned and bool((own == EXACT).all())


def _lazy(
    layout: _Layout, keys: Tensor, budgets: list[int], valid: Tensor | None
) -> Iterator[_Block]:
    """All queries of a sample, by segments. keys: [G, S, M], the selected ones; valid: [M]."""
    length, count = segment_length(layout.keys), segment_count(layout.keys)
    first = max(layout.offset, 0) // length
    biases: dict[tuple[int, ...], Tensor | None] = {}  # most segments are alike
    for segment in range(first, count):
        begin = layout.offset if segment == first else segment * length
        position = torch.arange(begin, min((segment + 1) * length, layout.keys))
        start, stop = neighbourhood(position[-1:], layout.keys, layout.window, layout.is_causal)
        near = slice(int(start), int(stop))
        shape = begin - near.start, near.stop - near.start, len(position)
        heads = torch.arange(layout.group).repeat_interleave(len(position))
        position = position.repeat(layout.group)
        causally = position if layout.is_causal else None
        if valid is not None or shape not in biases:
            biases[shape] = layout.piece(near, valid, causally).bias
        pieces = [_Piece(near, biases[shape], hides=valid is not None)]
        if budgets[segment] != EXACT:
            pieces.append(_Piece(keys[:, segment, : budgets[segment]].long()))
        elif layout.is_causal:
            pieces.append(layout.piece(slice(0, near.start), valid))
        else:
            pieces = [layout.piece(slice(0, layout.keys), valid)]
        yield _Block(slice(None), layout.rows(heads, position), pieces)


def _active(layout: _Layout, active: Tensor, valid: Tensor | None) -> Iterator[_Block]:
    """The active ones of a sample's queries [H, N], with all keys."""
    for g, own in enumerate(active.unflatten(0, (-1, layout.group))):
        for some in own.t().nonzero().split(ACTIVE_AT_ONCE):
            if not len(some):
                continue
            rows, heads = some.unbind(1)
            position = rows + layout.offset
            if layout.is_causal:
                certain = slice(0, int(position[0]))  # all of them see these
                rest = slice(certain.stop, int(position[-1]) + 1)
                pieces = [layout.piece(certain, valid), layout.piece(rest, valid, position)]
            else:
                pieces = [layout.piece(slice(0, layout.keys), valid)]
            yield _Block(slice(g, g + 1), layout.rows(heads, position), pieces)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    budget: Tensor,
    valid: Tensor | None,
    visual: Tensor | None,
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
    layout = _Layout.of(query, key, window, is_causal)
    if layout.is_exact(budget, valid):
        key, value = (each.repeat_interleave(layout.group, 1) for each in (key, value))
        # Flash attention takes the last stride for 1 without looking.
        result, logsumexp = _flash(query.contiguous(), key, value, 0.0, is_causal, scale=scale)
        total = logsumexp.contiguous()
        return result.contiguous(), total, torch.zeros_like(total, dtype=torch.bool)
    output = torch.empty(query.shape, dtype=query.dtype)
    exact = torch.promote_types(query.dtype, torch.float32)
    total = torch.empty(query.shape[:3], dtype=exact)
    samples = list(_samples(query, key, value, output, total, groups=key.shape[1]))
    padding = [None] * len(query) if valid is None else list(valid)
    for sample, *chosen, own in zip(keys, budget.tolist(), padding, samples, strict=True):
        for block in _lazy(layout, sample, *chosen):
            _attend(block, scale, *own)
    activated = active_queries(query, key, valid, visual, total, budget, is_causal, scale,
                               active, window, start, stop, tail)  # fmt: skip
    for rows, some, own in zip(activated, padding, samples, strict=True):
        for block in _active(layout, rows, some):
            _attend(block, scale, *own)
    return output, total, activated


def _samples(*tensors: Tensor, groups: int) -> Iterator[list[Tensor]]:
    """What of [B, H or G, N, ...] belongs to each sample, as [G, H / G * N, ...]."""
    together = [each.contiguous().unflatten(1, (groups, -1)).flatten(2, 3) for each in tensors]
    return map(list, zip(*together, strict=True))


def _attend(
    block: _Block, scale: float, query: Tensor, key: Tensor, value: Tensor, output: Tensor,
    total: Tensor,
) -> None:  # fmt: skip
    """Write the block's part of `output` and `total`."""
    parts = []
    for piece, some, keys, values, bias in _meetings(block, query, key, value):
        (part,), (seen,) = _flash(some, keys, values, 0.0, False, attn_mask=bias, scale=scale)
        if bias is not None and piece.hides:  # flash attention says 0 of who saw nothing
            seen = seen.masked_fill(bias.amax(-1)[0] == -torch.inf, -torch.inf)
        parts.append((part.to(total.dtype), seen))
    merged, logsumexp = reduce(_merged, parts)  # a query's own neighbourhood is always there
    block.put(output, merged)
    block.put(total, logsumexp)


def _merged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Results [G', rows, D] and log-sum-exps [G', rows] of the same queries on other keys."""
    share = (other[1] - one[1]).nan_to_num().sigmoid()  # both are -inf where nothing was seen
    return torch.lerp(one[0], other[0], share[..., None]), torch.logaddexp(one[1], other[1])


def _meetings(
    block: _Block, query: Tensor, key: Tensor, value: Tensor
) -> Iterator[tuple[_Piece, Tensor, Tensor, Tensor, Tensor | None]]:
    """The pieces that have keys: queries, keys and values [1, G', ..., D], and the bias."""
    some = block.of(query)[None]
    for piece in block.pieces:
        if isinstance(piece.place, slice):
            keys, values = (each[None, block.heads, piece.place] for each in (key, value))
        else:
            where = _flat(piece.place, key).flatten()
            keys, values = (
                each.flatten(0, 1).index_select(0, where).view(1, *piece.place.shape, key.shape[-1])
                for each in (key, value)
            )
        if keys.shape[2]:
            bias = piece.bias
            if bias is not None:
                bias = bias.expand(1, *some.shape[1:3], -1)
            yield piece, some, keys, values, bias


def _flat(place: Tensor, keys: Tensor) -> Tensor:
    """Where each head's keys [G, keys] are in [G * M]."""
    return place + keys.shape[1] * torch.arange(len(place))[:, None]


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
    layout = _Layout.of(query, key, window, is_causal)
    groups = key.shape[1]
    if layout.is_exact(budget, valid):
        repeated = [each.repeat_interleave(layout.group, 1) for each in (key, value)]
        gradient, query = gradient.contiguous(), query.contiguous()
        parts = _flash_backward(
            gradient, query, *repeated, output, total, 0.0, is_causal, scale=scale
        )
        shared = (each.unflatten(1, (groups, -1)).sum(2).contiguous() for each in parts[1:])
        return parts[0].contiguous(), *shared
    gradients = [torch.zeros(each.shape, dtype=total.dtype) for each in (query, key, value)]
    total = total.masked_fill(total == -torch.inf, torch.inf)  # weighs all scores with 0
    lazily = total.masked_fill(active, torch.inf)
    data = (query, key, value, gradient, output)
    samples = _samples(*data, lazily, total, *gradients, groups=groups)
    padding = [None] * len(query) if valid is None else list(valid)
    each_sample = zip(keys, budget.tolist(), active, padding, samples, strict=True)
    for chosen, budgets, rows, some, (*own, lazy_total, full_total, a, b, c) in each_sample:
        for block in _lazy(layout, chosen, budgets, some):
            _differentiate((a, b, c), block, scale, lazy_total, *own)
        for block in _active(layout, rows, some):
            _differentiate((a, b, c), block, scale, full_total, *own)
    grad_query, grad_key, grad_value = (each.to(query.dtype) for each in gradients)
    return grad_query, grad_key, grad_value


def _differentiate(
    into: tuple[Tensor, Tensor, Tensor], block: _Block, scale: float, total: Tensor, query: Tensor,
    key: Tensor, value: Tensor, gradient: Tensor, output: Tensor,
) -> None:  # fmt: skip
    """Add a block's part of the gradients of query, key and value."""
    up, result, norm = (block.of(each)[None] for each in (gradient, output, total))
    own = block.of(into[0])
    for piece, some, keys, values, bias in _meetings(block, query, key, value):
        parts = _flash_backward(
            up, some, keys, values, result, norm, 0.0, False, attn_mask=bias, scale=scale
        )
        own += parts[0][0]
        for into_keys, (part,) in zip(into[1:], parts[1:], strict=True):
            if isinstance(piece.place, slice):
                into_keys[block.heads, piece.place] += part
            else:
                where = _flat(piece.place, key).flatten()
                into_keys.flatten(0, 1).index_add_(0, where, part.flatten(0, 1).to(own.dtype))
    block.put(into[0], own)
