"""OmniSparse attention on a CPU: torch's own flash attention on gathered keys, block by block.

A block of queries meets pieces of keys (its neighbourhoods, the selected keys on either side of
them, or simply all keys), and the results are merged by their log-sum-exp. The backward pass of
flash attention asks for a result and its log-sum-exp only to weigh gradients, so with the merged
ones each piece gets its share. Blocks are large, since flash attention is slow on small ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .selection import EXACT, TILE, active_queries, segment_length

__all__ = ["backward", "forward"]

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

ACTIVE_AT_ONCE = 256  # active queries that meet all keys together


class _Piece(NamedTuple):
    """Keys of one head [M] that a block of queries meets.

    place: which; with [tiles, keys], each of as many equal parts of the queries meets its own.
    bias: what is added to the scores, [queries of a part, keys] or [tiles, 1, those, keys].
    hides: whether the bias may hide all of them from a query.
    """

    place: slice | Tensor
    bias: Tensor | None = None
    hides: bool = True


class _Block(NamedTuple):
    """Queries of one head group [H / G, N], named by head and row, and the keys that they meet."""

    queries: tuple[Tensor, Tensor]
    pieces: list[_Piece]


class _Layout(NamedTuple):
    """Where queries and keys are. offset: the first query's position."""

    keys: int
    offset: int
    group: int  # query heads that share a key head
    is_causal: bool
    dtype: torch.dtype

    @staticmethod
    def of(query: Tensor, key: Tensor, is_causal: bool) -> _Layout:
        keys, group = key.shape[2], query.shape[1] // key.shape[1]
        return _Layout(keys, keys - query.shape[2], group, is_causal, query.dtype)

    def bias(self, hidden: Tensor) -> Tensor:
        return torch.zeros(hidden.shape, dtype=self.dtype).masked_fill_(hidden, -torch.inf)

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """Queries of a segment in tiles of equal length: first position, tiles, their length."""
        length = segment_length(self.keys)
        place = self.offset
        while place < self.keys:
            end = min((place // length + 1) * length, self.keys)
            whole = (end - place) // TILE if place % TILE == 0 else 0
            size = TILE if whole else min((place // TILE + 1) * TILE, end) - place
            yield place, max(whole, 1), size
            place += max(whole, 1) * size


class _Run(NamedTuple):
    """Queries of all heads of a group, in tiles of one segment, and what does not depend on heads.

    queries: as in `_Block`, tile by tile. start, stop: of the tiles' neighbourhoods, [tiles].
    """

    segment: int
    queries: tuple[Tensor, Tensor]
    start: Tensor
    stop: Tensor
    near: _Piece


def _runs(layout: _Layout, valid: Tensor | None, window: int) -> Iterator[_Run]:
    """All queries of a sample. valid: [M]."""
    for first, tiles, size in layout.runs():
        # [tiles, heads, rows]: parts of the queries are tiles.
        position = first + torch.arange(tiles * size).view(tiles, 1, size)
        heads = torch.arange(layout.group)[:, None].expand(tiles, -1, size).flatten()
        position = position.expand(-1, layout.group, -1).flatten()
        tile = first // TILE * TILE + TILE * torch.arange(tiles)
        start = (tile - window).clamp(min=0)
        stop = (tile + TILE + window).clamp(0, layout.keys)
        if layout.is_causal:
            stop = (tile + TILE).clamp(max=first + tiles * size)
        near = _neighbours(layout, position.view(tiles, -1), start, stop, valid)
        segment = max(first, 0) // segment_length(layout.keys)
        yield _Run(segment, (heads, position - layout.offset), start, stop, near)


def _lazy(
    layout: _Layout, runs: list[_Run], keys: Tensor, budgets: list[int], valid: Tensor | None
) -> Iterator[_Block]:
    """All queries of a group. keys: [S, M], the selected ones of its key head."""
    for segment, queries, start, stop, near in runs:
        pieces = [near]
        if budgets[segment] == EXACT:
            everything = torch.arange(layout.keys)
            far = everything[: int(start[-1])], everything[int(stop[0]) :]
        else:
            selected = keys[segment, : budgets[segment]].long()
            far = selected[selected < start[-1]], selected[selected >= stop[0]]
        before = far[0] < start[:, None], far[0] < start[0]
        behind = far[1] >= stop[:, None], far[1] >= stop[-1]
        sides = zip(far, (before, behind), strict=True)
        for places, (seen, common) in list(sides)[: 1 if layout.is_causal else 2]:
            # What is far from all tiles, then what is far from some of them.
            pieces.append(_Piece(places[common], _padding(layout, places[common], valid)))
            some, seen = places[~common], seen[:, ~common]
            if valid is not None:
                seen = seen & valid[some]
            bias = layout.bias(~seen)[:, None, None]
            pieces.append(_Piece(some.expand(len(seen), -1), bias))
        yield _Block(queries, pieces)


def _neighbours(
    layout: _Layout, position: Tensor, start: Tensor, stop: Tensor, valid: Tensor | None
) -> _Piece:
    """Keys [start, stop) of each tile [tiles] for its queries [tiles, queries of a tile]."""
    width = max(int((stop - start).max()), 0)  # positions before the first key may see none
    place = start[:, None] + torch.arange(width)
    seen = (place < stop[:, None])[:, None]  # [tiles, 1, width]
    place = place.clamp(max=layout.keys - 1)
    if layout.is_causal:
        seen = seen & (place[:, None] <= position[..., None])
    if valid is not None:
        seen = seen & valid[place][:, None]
    bias = None if bool(seen.all()) else layout.bias(~seen)[:, None]
    # A query is among its neighbours, unless that is padding or lies before the first key.
    return _Piece(place, bias, hides=valid is not None or layout.offset < 0)


def _padding(layout: _Layout, place: slice | Tensor, valid: Tensor | None) -> Tensor | None:
    return None if valid is None else layout.bias(~valid[place])[None]


def _active(layout: _Layout, active: Tensor, valid: Tensor | None) -> Iterator[_Block]:
    """The active ones of a group's queries [H / G, N], in their order, with all keys."""
    for some in active.t().nonzero().split(ACTIVE_AT_ONCE):
        if not len(some):
            continue
        rows, heads = some.unbind(1)
        position = rows + layout.offset
        end = int(position[-1]) + 1 if layout.is_causal else layout.keys
        certain = slice(0, int(position[0]) if layout.is_causal else end)  # all of them see these
        pieces = [_Piece(certain, _padding(layout, certain, valid))]
        place = slice(certain.stop, end)
        hidden = torch.arange(place.start, place.stop) > position[:, None]
        if valid is not None:
            hidden = hidden | ~valid[place]
        pieces.append(_Piece(place, layout.bias(hidden), hides=valid is not None))
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
    padding = [None] * batch if valid is None else list(valid)
    budgets = budget.tolist()
    for b, g, own in _groups(query, key, value, output, total):
        if g == 0:
            runs = list(_runs(layout, padding[b], window))
        for block in _lazy(layout, runs, keys[b, g], budgets[b], padding[b]):
            _attend(block, scale, *own)
    chosen = active_queries(query, key, valid, total, budget, is_causal, scale,
                            active, window, start, stop, tail)  # fmt: skip
    for b, g, own in _groups(query, key, value, output, total):
        mine = chosen[b].unflatten(0, (-1, layout.group))[g]
        for block in _active(layout, mine, padding[b]):
            _attend(block, scale, *own)
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
    block: _Block, scale: float, query: Tensor, key: Tensor, value: Tensor, output: Tensor,
    total: Tensor,
) -> None:  # fmt: skip
    """Write the block's part of `output` and `total`."""
    some = query[block.queries]
    merged = torch.zeros(some.shape, dtype=total.dtype)
    logsumexp = torch.full(some.shape[:1], -torch.inf, dtype=total.dtype)
    for piece, rows, keys, values, bias in _meetings(some, key, value, block):
        part, seen = _flash(rows, keys, values, 0.0, False, attn_mask=bias, scale=scale)
        if bias is not None and piece.hides:  # flash attention says 0 of who saw nothing
            seen = seen.masked_fill((bias.amax(-1) == -torch.inf).expand(seen.shape), -torch.inf)
        part, seen = part.reshape(merged.shape).to(total.dtype), seen.flatten().to(total.dtype)
        both = torch.logaddexp(logsumexp, seen)
        base = both.clamp(min=torch.finfo(total.dtype).min)
        merged = merged * (logsumexp - base).exp()[:, None] + part * (seen - base).exp()[:, None]
        logsumexp = both
    output[block.queries] = merged.to(output.dtype)
    total[block.queries] = logsumexp


def _meetings(
    some: Tensor, key: Tensor, value: Tensor, block: _Block
) -> Iterator[tuple[_Piece, Tensor, Tensor, Tensor, Tensor | None]]:
    """The pieces that have keys: queries [tiles, 1, rows, D], keys and values, and the bias."""
    for piece in block.pieces:
        keys, values = key[piece.place], value[piece.place]
        if not keys.shape[-2]:
            continue
        keys, values = (each.view(-1, 1, *each.shape[-2:]) for each in (keys, values))
        rows = some.view(len(keys), 1, -1, some.shape[-1])
        bias = None if piece.bias is None else piece.bias.expand(*rows.shape[:3], -1)
        yield piece, rows, keys, values, bias


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
    budgets = budget.tolist()
    for b, g, own in _groups(query, key, value, gradient, output, lazily, total, gradients[0]):
        mine = active[b].unflatten(0, (-1, layout.group))[g]
        some = None if valid is None else valid[b]
        if g == 0:
            runs = list(_runs(layout, some, window))
        lazy_total, full_total, grad_query = own[5:]
        into = grad_query, gradients[1][b, g], gradients[2][b, g]
        for block in _lazy(layout, runs, keys[b, g], budgets[b], some):
            _differentiate(into, block, scale, lazy_total, *own[:5])
        for block in _active(layout, mine, some):
            _differentiate(into, block, scale, full_total, *own[:5])
    grad_query, grad_key, grad_value = (each.to(query.dtype) for each in gradients)
    return grad_query, grad_key, grad_value


def _differentiate(
    into: tuple[Tensor, Tensor, Tensor], block: _Block, scale: float, total: Tensor, query: Tensor,
    key: Tensor, value: Tensor, gradient: Tensor, output: Tensor,
) -> None:  # fmt: skip
    """Add a block's part of the gradients of query, key and value."""
    grad_query, grad_key, grad_value = into
    some, up, result = (each[block.queries] for each in (query, gradient, output))
    own = torch.zeros(some.shape, dtype=grad_query.dtype)
    for piece, rows, keys, values, bias in _meetings(some, key, value, block):
        parts = _flash_backward(
            up.view_as(rows), rows, keys, values, result.view_as(rows),
            total[block.queries].view(rows.shape[:3]), 0.0, False, attn_mask=bias, scale=scale,
        )  # fmt: skip
        own += parts[0].reshape(own.shape)
        for into_keys, part in zip((grad_key, grad_value), parts[1:], strict=True):
            rows_of = part.flatten(0, 2).to(into_keys.dtype)
            if isinstance(piece.place, slice):
                into_keys[piece.place] += rows_of
            else:
                into_keys.index_add_(0, piece.place.flatten(), rows_of)
    grad_query[block.queries] += own


def _is_everything(layout: _Layout, budget: Tensor, valid: Tensor | None) -> bool:
    """Whether one call of flash attention will do. Its causality counts from the first key."""
    aligned = not layout.is_causal or layout.offset == 0
    own = budget[:, max(layout.offset, 0) // segment_length(layout.keys) :]
    return valid is None and aligned and bool((own == EXACT).all())
