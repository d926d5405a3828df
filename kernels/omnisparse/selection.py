"""Which keys and queries OmniSparse attention looks at: found cheaply, from a few probe rows.

The paper (arXiv 2511.12201) was available as an abstract only: queries are lazy or active, and the
flattest head sets one key budget for all heads. The rules by which that is decided here are ours.

A query at position `p` always sees its *neighbourhood*: the tile of `TILE` positions that it is in
and `window` keys before (and, where attention is not causal, after) that tile. Everything beyond is
*far*. Of the far keys a head reads the selected ones, which are the same for every query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import OptionError

__all__ = ["TILE", "Choice", "Selection", "neighbourhood", "select"]

TILE = 128  # queries that share a neighbourhood, and rows of a kernel's tile
PROBES = 64  # rows of each kind: the last ones, and ones spread over what comes before
PROBES_AT_ONCE = 8  # few enough for their scores to stay in a CPU's cache: three times faster
HEAVIEST = 64  # far keys by which a query's far attention is judged
WORTH = 0.7  # share of all pairs above which exact attention is as fast


class Selection(NamedTuple):
    """What is looked at. B: batch, G: key/value heads, H: query heads, N: queries, M: keys.

    keys: int32 [B, G, M]; the first `budget` of each row are the selected keys, ascending.
    budget: int64 [], the number that all heads share; M where attention is exact.
    active: bool [B, G, N]; the others see their neighbourhood and the sinks only.
    recall: float32 [B, H], the share of the probe rows' attention that is kept.
    needed: int64 [B, H], the budget at which each head alone reaches the asked recall.
    """

    keys: Tensor
    budget: Tensor
    active: Tensor
    recall: Tensor
    needed: Tensor


@dataclass(frozen=True)
class Choice:
    """How to select.

    recall: share of each head's attention to keep, in (0, 1]; 1 is exact attention.
    heads: the quantile of the heads' budgets that all get; 1 is the flattest head's.
    window: keys of the neighbourhood beyond the tile. sinks: first keys, always selected.
    span: [start, stop) of the queries that may be lazy; empty by default.
    locality: a query of the span is lazy if its neighbourhood and the sinks hold at least this
    share of its attention, in every head of its group.
    Raises OptionError for values out of range.
    """

    recall: float = 0.95
    heads: float = 1.0
    window: int = 128
    sinks: int = 4
    span: tuple[int, int] = (0, 0)
    locality: float = 0.95

    def __post_init__(self) -> None:
        for name, share in (("recall", self.recall), ("locality", self.locality)):
            if not 0 < share <= 1:
                raise OptionError(f"{name} is {share}; needed is a share in (0, 1]")
        if not 0 <= self.heads <= 1:
            raise OptionError(f"heads is {self.heads}; needed is a quantile in [0, 1]")
        if self.window < 0 or self.sinks < 0:
            raise OptionError(
                f"window is {self.window} and sinks {self.sinks}; neither can be negative"
            )
        if len(self.span) != 2 or not 0 <= self.span[0] <= self.span[1]:
            raise OptionError(f"span is {self.span}; needed is 0 <= start <= stop")

    def settings(self) -> tuple[float | int, ...]:
        """As the operator takes them, in its order."""
        return self.recall, self.heads, self.window, self.sinks, *self.span, self.locality


def neighbourhood(
    position: Tensor, keys: int, window: int, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """The neighbourhoods [start, stop) of queries at these positions."""
    first = position.div(TILE, rounding_mode="floor") * TILE
    start = (first - window).clamp(min=0)
    stop = position + 1 if is_causal else (first + TILE + window).clamp(max=keys)
    return start, stop


def select(query: Tensor, key: Tensor, is_causal: bool, scale: float, choice: Choice) -> Selection:
    """Select for `query` [B, H, N, D] and `key` [B, G, M, D]; queries are the last N positions.

    Everything is selected where the asked recall is 1, where scores are not finite, and where less
    would not pay: sequences of a few neighbourhoods, and pairs beyond `WORTH` of all pairs.
    """
    heads, keys = query.shape[1], key.shape[2]
    exact = _exact(query, key)
    if choice.recall >= 1 or keys <= 2 * (choice.window + TILE):
        return exact
    far = _far_attention(query, key, is_causal, scale, choice.window)
    if not far.isfinite().all():
        return exact
    rank = far.mean(2)
    rank[..., : choice.sinks] += 1  # more than any share: these come first
    order = rank.sort(dim=-1, descending=True, stable=True).indices
    by_order = far.gather(-1, order[:, :, None].expand_as(far))
    kept = 1 - far.sum(-1, keepdim=True) + by_order.cumsum(-1)
    needed = ((kept < choice.recall).sum(-1) + 1).clamp(max(choice.sinks, 1), keys)
    budgets = needed.flatten(1).sort(dim=-1).values
    budget = int(budgets[:, round(choice.heads * (heads - 1))].max())
    selected = order[..., :budget].sort(dim=-1).values
    if not _pays(selected, query.shape[2], keys, is_causal, choice.window):
        return exact
    active = exact.active
    if choice.span[0] < choice.span[1]:
        heaviest = order[..., choice.sinks : choice.sinks + HEAVIEST]
        held = by_order[..., choice.sinks : choice.sinks + HEAVIEST].sum(-1) / far.sum(-1)
        active = _active(query, key, heaviest, held, is_causal, scale, choice)
    chosen = torch.cat([selected, order[..., budget:]], dim=-1).int()
    recall = kept[..., budget - 1].flatten(1).float()
    return Selection(chosen, exact.budget.new_tensor(budget), active, recall, needed.flatten(1))


def _probe_rows(queries: int, is_causal: bool, device: torch.device) -> Tensor:
    """The last rows, and as many spread over the rows before them (causal: their later half)."""
    last = max(queries - PROBES, 0)
    first = last // 2 if is_causal else 0
    spread = torch.linspace(first, max(last - 1, first), min(PROBES, last - first), device=device)
    return torch.cat([spread.long().unique(), torch.arange(last, queries, device=device)])


def _far_attention(
    query: Tensor, key: Tensor, is_causal: bool, scale: float, window: int
) -> Tensor:
    """How much attention probe rows pay to each key that is far from them: [B, G, H / G, M]."""
    batch, heads, queries, _ = query.shape
    groups, keys = key.shape[1:3]
    rows = _probe_rows(queries, is_causal, query.device)
    column = torch.arange(keys, device=key.device)
    far = torch.zeros(batch, groups, heads // groups, keys, device=key.device)
    for some in rows.split(PROBES_AT_ONCE):
        position = some + keys - queries
        seen = int(position[-1]) + 1 if is_causal else keys
        probes = (query[:, :, some] * scale).unflatten(1, (groups, -1)).flatten(2, 3)
        scores = (probes @ key[:, :, :seen].transpose(-1, -2)).float()
        scores = scores.unflatten(2, (-1, len(some)))
        if is_causal:
            hidden = int(position[0])
            scores[..., hidden:].masked_fill_(column[hidden:seen] > position[:, None], -torch.inf)
        attention = scores.softmax(-1)
        start, stop = neighbourhood(position, keys, window, is_causal)
        near = slice(int(start[0]), int(stop[-1]))
        inside = (column[near] >= start[:, None]) & (column[near] < stop[:, None])
        attention[..., near].masked_fill_(inside, 0)
        far[..., :seen] += attention.sum(-2)
    return far / len(rows)


def _pays(selected: Tensor, queries: int, keys: int, is_causal: bool, window: int) -> bool:
    """Whether selected pairs are few enough against all pairs, counted by tiles of queries."""
    position = torch.arange(keys - queries, keys, TILE, device=selected.device)
    start, stop = neighbourhood(position, keys, window, is_causal)
    if is_causal:
        stop = (position + TILE).clamp(max=keys)
    borders = torch.stack([start, stop]).expand(*selected.shape[:2], -1, -1).flatten(2)
    before, upto = torch.searchsorted(selected, borders.contiguous()).chunk(2, dim=-1)
    far = before if is_causal else before + selected.shape[-1] - upto
    pairs = (far + (stop - start)).float().mean((0, 1)).sum()
    everything = stop.sum() if is_causal else keys * len(position)
    return bool(pairs < WORTH * everything)


def _active(
    query: Tensor,
    key: Tensor,
    heaviest: Tensor,
    held: Tensor,
    is_causal: bool,
    scale: float,
    choice: Choice,
) -> Tensor:
    """Queries of the span that look far; [B, G, N].

    A query's far attention is judged by `heaviest` [B, G, K], the far keys that most attention goes
    to, which hold the share `held` [B, G, H / G] of it in the probe rows.
    """
    batch, _, queries, width = query.shape
    groups, keys = key.shape[1:3]
    active = torch.ones(batch, groups, queries, dtype=torch.bool, device=query.device)
    column = torch.arange(keys, device=key.device)
    few = key.gather(2, heaviest[..., None].expand(-1, -1, -1, width))
    first, last = max(choice.span[0], 0), min(choice.span[1], queries)
    for tile in range(first, last, TILE):
        rows = torch.arange(tile, min(tile + TILE, last), device=query.device)
        position = rows + keys - queries
        start, stop = neighbourhood(position, keys, choice.window, is_causal)
        near = slice(int(start[0]), int(stop[-1]))
        probes = (query[:, :, rows] * scale).unflatten(1, (groups, -1))  # [B, G, H / G, rows, D]
        inside = (column[near] >= start[:, None]) & (column[near] < stop[:, None])
        scores = (probes @ key[:, :, None, near].transpose(-1, -2)).float()
        here = scores.masked_fill_(~inside, -torch.inf).logsumexp(-1)
        sinks = (probes @ key[:, :, None, : choice.sinks].transpose(-1, -2)).float()
        sinks.masked_fill_(column[: choice.sinks] >= start[:, None], -torch.inf)
        here = torch.logaddexp(here, sinks.logsumexp(-1))
        there = (probes @ few[:, :, None].transpose(-1, -2)).float()
        beyond = heaviest[:, :, None, None] < start[:, None]
        if not is_causal:
            beyond = beyond | (heaviest[:, :, None, None] >= stop[:, None])
        there = there.masked_fill_(~beyond, -torch.inf).logsumexp(-1) - held[..., None].log()
        share = (here - there).sigmoid()
        active[:, :, rows] = (share < choice.locality).any(2)
    return active


def _exact(query: Tensor, key: Tensor) -> Selection:
    batch, heads, queries, _ = query.shape
    groups, keys = key.shape[1:3]
    device = key.device
    return Selection(
        torch.arange(keys, dtype=torch.int32, device=device).repeat(batch, groups, 1),
        torch.tensor(keys, device=device),
        torch.ones(batch, groups, queries, dtype=torch.bool, device=device),
        torch.ones(batch, heads, device=device),
        torch.full((batch, heads), keys, device=device),
    )
