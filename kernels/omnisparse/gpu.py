"""OmniSparse attention on a GPU: launches the Triton kernels. The same functions as in `cpu`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .reference import choose, probe_rows
from .selection import (
    PROBES,
    Choice,
    active_queries,
    exact_selection,
    segment_count,
    segment_length,
)
from .triton import (
    forward_kernel,
    key_gradient_kernel,
    probe_kernel,
    query_gradient_kernel,
    selected_key_gradient_kernel,
)

__all__ = ["Blocks", "backward", "blocks_for", "forward", "probe_blocks", "probe_shares", "select"]


@dataclass(frozen=True)
class Blocks:
    """How a kernel is cut. Found by what fits into registers: see `resources`."""

    queries: int
    keys: int
    warps: int
    stages: int

    def launch(self) -> dict[str, int]:
        """As keyword arguments of a launch."""
        return {
            "BLOCK_QUERIES": self.queries,
            "BLOCK_KEYS": self.keys,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def blocks_for(width: int, size: int, backward: bool) -> Blocks:
    """The largest, of those tried, that spill at most 8 bytes on any of the four targets.

    width: of a head, a power of two. size: bytes of a number.
    """
    widest = 0 if width <= 64 else 1 if width == 128 else 2
    table = {
        (2, False): (Blocks(64, 64, 4, 1), Blocks(64, 32, 4, 1), Blocks(32, 32, 4, 1)),
        (2, True): (Blocks(64, 32, 8, 1), Blocks(32, 32, 8, 1), Blocks(16, 16, 4, 1)),
        (4, False): (Blocks(32, 32, 4, 1), Blocks(32, 16, 8, 1), Blocks(16, 16, 4, 1)),
        (4, True): (Blocks(32, 16, 4, 1), Blocks(16, 16, 4, 1), Blocks(16, 16, 4, 1)),
    }
    return table[size, backward][widest]


def probe_blocks(width: int, size: int) -> Blocks:
    """As `blocks_for`, for the probes of a segment; nothing spills."""
    return Blocks(PROBES, 32 if width * size < 512 else 16, 8, 1)


@dataclass(frozen=True)
class _Launch:
    """What all kernels of one call share."""

    query: Tensor
    key: Tensor
    is_causal: bool
    scale: float
    padded: bool
    backward: bool

    @property
    def blocks(self) -> Blocks:
        width = self.settings()["WIDTH"]
        return blocks_for(width, self.query.element_size(), self.backward)

    def settings(self) -> dict[str, Any]:
        width = self.query.shape[3]
        return {
            "GROUP": self.query.shape[1] // self.key.shape[1],
            "WIDTH": max(1 << (width - 1).bit_length(), 16),
            "CAUSAL": self.is_causal,
            "PADDED": self.padded,
        }

    def sizes(self, begin: int) -> tuple[Any, ...]:
        queries, (groups, keys, width) = self.query.shape[2], self.key.shape[1:]
        segments, scale = segment_count(keys), self.scale / math.log(2)
        length = segment_length(keys)
        return queries, keys, width, groups, segments, length, begin, scale

    @property
    def begin(self) -> int:
        """Position at which the first block of queries begins, so that blocks divide segments."""
        offset = self.key.shape[2] - self.query.shape[2]
        return offset // self.blocks.queries * self.blocks.queries

    def grid(self, listed: bool) -> tuple[int, int]:
        batch, groups, keys, _ = self.key.shape
        group = self.query.shape[1] // groups
        if listed:
            count = -(-self.query.shape[2] * group // self.blocks.queries)
        else:
            count = -(-(keys - self.begin) // self.blocks.queries) * group
        return count, batch * groups


def _lists(active: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The active queries of each key head, ascending, and how many there are."""
    flat = active.unflatten(1, (groups, -1)).transpose(2, 3).flatten(2)  # [B, G, N * GROUP]
    rows = flat.byte().argsort(dim=-1, descending=True, stable=True)
    return rows.int(), flat.sum(-1, dtype=torch.int32)


def select(
    query: Tensor,
    key: Tensor,
    valid: Tensor | None,
    is_causal: bool,
    scale: float,
    choice: Choice,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `selection.select`; all segments at once, without a wait for the device."""
    if choice.recall >= 1 or choice.active >= 1:
        return exact_selection(key, query.shape[1], segment_count(key.shape[2]))
    shares = None
    if choice.lazy != "local":
        shares = probe_shares(query, key, valid, probe_rows(query, key), is_causal, scale)
    return choose(query, key, shares, valid, is_causal, choice)


def probe_shares(
    query: Tensor, key: Tensor, valid: Tensor | None, rows: Tensor, is_causal: bool, scale: float
) -> Tensor:
    """See `reference.probe_shares`."""
    query, key = query.contiguous(), key.contiguous()
    launch = _Launch(query, key, is_causal, scale, valid is not None, False)
    batch, heads, queries, width = query.shape
    keys, (segments, probes) = key.shape[2], rows.shape
    shares = query.new_zeros(batch, heads, segments, keys, dtype=torch.float32)
    rows, settings = rows.int().contiguous(), launch.settings()
    given = rows if valid is None else valid.contiguous()
    blocks = probe_blocks(settings["WIDTH"], query.element_size())
    probe_kernel[segments, batch * heads](
        query, key, given, rows, shares, queries, keys, width, key.shape[1], segments,
        scale / math.log(2), **settings, PROBES=probes, BLOCK_KEYS=blocks.keys,
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return shares


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
    """See `cpu.forward`."""
    query, key, value = (each.contiguous() for each in (query, key, value))
    valid = None if valid is None else valid.contiguous()
    launch = _Launch(query, key, is_causal, scale, valid is not None, False)
    output = torch.empty_like(query)
    total = query.new_empty(query.shape[:3], dtype=torch.float32)

    def attend(rows: Tensor, counts: Tensor, listed: bool) -> None:
        forward_kernel[launch.grid(listed)](
            query, key, value, keys, budget, budget if valid is None else valid, rows, counts,
            output, total, *launch.sizes(launch.begin), window,
            **launch.settings(), **launch.blocks.launch(), LISTED=listed,
        )  # fmt: skip

    attend(budget, budget, False)
    natural = total * math.log(2)
    chosen = active_queries(query, key, valid, visual, natural, budget, is_causal, scale,
                            active, window, start, stop, tail)  # fmt: skip
    attend(*_lists(chosen, key.shape[1]), True)
    return output, total * math.log(2), chosen


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
    """See `cpu.backward`.

    Deterministic under `torch.use_deterministic_algorithms(True)`: segments that share keys then
    add to their gradients one after the other, and otherwise at once.
    """
    gradient, query, key, value = (each.contiguous() for each in (gradient, query, key, value))
    valid = None if valid is None else valid.contiguous()
    launch = _Launch(query, key, is_causal, scale, valid is not None, True)
    delta = (gradient.float() * output.float()).sum(-1)
    total = total.masked_fill(total == -torch.inf, torch.inf) / math.log(2)
    grad_query = torch.empty_like(query)
    grad_key, grad_value = (
        each.new_zeros(each.shape, dtype=torch.float32) for each in (key, value)
    )
    given = budget if valid is None else valid
    settings, cut = launch.settings(), launch.blocks.launch()
    shared = {**settings, **cut}
    batch, groups, count, _ = key.shape
    blocks = -(-count // launch.blocks.keys)

    def differentiate(norm: Tensor, rows: Tensor, counts: Tensor, listed: bool) -> None:
        data = query, key, value, gradient, norm, delta
        query_gradient_kernel[launch.grid(listed)](
            *data, keys, budget, given, rows, counts, grad_query,
            *launch.sizes(launch.begin), scale, window, **shared, LISTED=listed,
        )  # fmt: skip
        key_gradient_kernel[blocks, batch * groups](
            *data, budget, given, rows, counts, grad_key, grad_value,
            *launch.sizes(launch.begin), scale, window, **shared, LISTED=listed,
        )  # fmt: skip

    lazily = total.masked_fill(active, torch.inf)
    differentiate(lazily, budget, budget, False)
    differentiate(total, *_lists(active, groups), True)
    segments = budget.shape[1]
    ordered = torch.are_deterministic_algorithms_enabled()
    for segment in range(segments) if ordered else [0]:
        selected_key_gradient_kernel[blocks, batch * groups, 1 if ordered else segments](
            query, key, value, gradient, lazily, delta, keys, budget, grad_key, grad_value,
            *launch.sizes(segment), scale, GROUP=settings["GROUP"], WIDTH=settings["WIDTH"],
            **cut, ATOMIC=not ordered,
        )  # fmt: skip
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)
