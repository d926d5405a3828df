"""Which keys and queries OmniSparse attention looks at: found cheaply, from a few probe rows.

The paper (arXiv 2511.12201) was available as an abstract only: queries are lazy or active, and the
flattest head sets one key budget for all heads. The rules by which that is decided here are ours.

A query at position `p` always sees its *neighbourhood*: the tile of `TILE` positions that it is in
and `window` keys before (and, where attention is not causal, after) that tile. Everything beyond is
*far*. Of the far keys a lazy query sees those that were selected for its *segment*, a run of
`segment_length` positions; an active query sees them all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import OptionError

__all__ = [
    "EXACT",
    "LAZY",
    "TILE",
    "Choice",
    "Selection",
    "active_queries",
    "neighbourhood",
    "segment_count",
    "segment_length",
    "select",
]

TILE = 128  # queries that share a neighbourhood, and the rows of a kernel's tile
SEGMENT = 256  # queries that share selected keys, of up to SEGMENTS * SEGMENT keys
SEGMENTS = 64  # at most, so that what is kept of the selection grows with the number of keys only
PROBES = 32  # rows of each segment whose attention is computed
WORTH = 0.7  # share of all pairs above which a segment is exact: an upper bound of what pays
EXACT = -1  # a budget: every key
LAZY = ("selected", "local")


class Selection(NamedTuple):
    """What is looked at. B: batch, G: key/value heads, H: query heads, M: keys, S: segments.

    keys: int32 [B, G, S, M]; the first `budget` of each row are the selected keys, ascending.
    budget: int32 [B, S], the number that all heads share; `EXACT` where every key is seen.
    recall: float32 [B, H, S], the share of the probe rows' attention that is kept.
    needed: int32 [B, H, S], the budget at which each head alone reaches the asked recall.
    """

    keys: Tensor
    budget: Tensor
    recall: Tensor
    needed: Tensor


@dataclass(frozen=True)
class Choice:
    """How to select.

    recall: share of each head's attention that lazy queries keep, in (0, 1]; 1 is exact attention.
    active: share of the queries that see every key, in [0, 1]: those that would miss most.
    heads: the quantile of the heads' budgets that all get; 1 is the flattest head's.
    window: keys of the neighbourhood beyond the tile. sinks: first keys, always selected.
    lazy: what lazy queries see besides their neighbourhood: the "selected" keys, or, with "local",
    the sinks only.
    span: [start, stop) of the queries that may be lazy; None: all but the last `tail`.
    tail: so many last queries are always active.
    Raises OptionError for values out of range.
    """

    recall: float = 0.9
    active: float = 0.1
    heads: float = 1.0
    window: int = 128
    sinks: int = 4
    lazy: str = "selected"
    span: tuple[int, int] | None = None
    tail: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.recall <= 1:
            raise OptionError(f"recall is {self.recall}; needed is a share in (0, 1]")
        for name, share in (("active", self.active), ("heads", self.heads)):
            if not 0 <= share <= 1:
                raise OptionError(f"{name} is {share}; needed is a number in [0, 1]")
        for name, count in (("window", self.window), ("sinks", self.sinks), ("tail", self.tail)):
            if count < 0:
                raise OptionError(f"{name} is {count}; it can't be negative")
        if self.lazy not in LAZY:
            raise OptionError(f"lazy is {self.lazy!r}; it has to be one of {', '.join(LAZY)}")
        if self.span is not None and (len(self.span) != 2 or not 0 <= self.span[0] <= self.span[1]):
            raise OptionError(f"span is {self.span}; needed is 0 <= start <= stop")

    def selecting(self) -> tuple[float, float, float, int, int, str]:
        """What `accel::omnisparse_select` takes, in its order."""
        return self.recall, self.active, self.heads, self.window, self.sinks, self.lazy

    def attending(self) -> tuple[float, int, int, int, int]:
        """What `accel::omnisparse_attend` takes, in its order; an open span ends at -1."""
        return self.active, self.window, *(self.span or (0, -1)), self.tail


def segment_length(keys: int) -> int:
    """Positions of a segment: a multiple of SEGMENT, and at most SEGMENTS segments."""
    return (keys + SEGMENTS * SEGMENT - 1) // (SEGMENTS * SEGMENT) * SEGMENT


def segment_count(keys: int) -> int:
    """How many segments there are."""
    length = segment_length(keys)
    return (keys + length - 1) // length


def neighbourhood(
    position: Tensor, keys: int, window: int, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """The neighbourhoods [start, stop) of queries at these positions."""
    first = position.div(TILE, rounding_mode="floor") * TILE
    start = (first - window).clamp(min=0)
    stop = position + 1 if is_causal else (first + TILE + window).clamp(max=keys)
    return start, stop


def select(
    query: Tensor,
    key: Tensor,
    valid: Tensor | None,
    is_causal: bool,
    scale: float,
    choice: Choice,
) -> Selection:
    """Select for `query` [B, H, N, D] and `key` [B, G, M, D]; queries are the last N positions.

    valid: bool [B, M], the keys that may be seen (the others are padding); None: all.
    A segment is exact where the asked recall is 1, where scores are not finite, and where more than
    `WORTH` of all pairs would be left: short ones, and those with large budgets.
    """
    heads, queries = query.shape[1:3]
    batch, groups, keys = key.shape[:3]
    length = segment_length(keys)
    segments = segment_count(keys)
    selection = _exact(key, heads, segments)
    if choice.recall >= 1 or choice.active >= 1 or queries > keys:
        return selection
    for segment in range((keys - queries) // length, segments):
        first, last = max(segment * length, keys - queries), min((segment + 1) * length, keys)
        dense = (first + last) / 2 if is_causal else keys
        near = choice.window + TILE / 2 if is_causal else 2 * choice.window + TILE
        affordable = (WORTH - choice.active) * dense - near
        if affordable <= choice.sinks:
            continue
        if choice.lazy == "local":
            far = torch.zeros(batch, groups, heads // groups, last, device=key.device)
        else:
            rows = torch.linspace(first - 1, last - 1, PROBES + 1).long()[1:].unique()
            far = _far_attention(query, key, valid, rows, is_causal, scale, choice.window)
        _share_budget(selection, segment, far, valid, affordable, choice)
    return selection


def _far_attention(
    query: Tensor,
    key: Tensor,
    valid: Tensor | None,
    position: Tensor,
    is_causal: bool,
    scale: float,
    window: int,
) -> Tensor:
    """How much attention the probe rows at these positions pay to keys far from them, on average:
    [B, G, H / G, keys up to the last row's]."""
    groups, keys = key.shape[1:3]
    queries = query.shape[2]
    seen = int(position[-1]) + 1 if is_causal else keys
    start, stop = neighbourhood(position, keys, window, is_causal)
    bounds = torch.stack([position, start, stop]).to(key.device)[..., None]
    rows = (position - (keys - queries)).to(key.device)
    column = torch.arange(seen, device=key.device)
    probes = (query[:, :, rows] * scale).unflatten(1, (groups, -1)).flatten(2, 3)
    scores = (probes @ key[:, :, :seen].transpose(-1, -2)).float().unflatten(2, (-1, len(rows)))
    if is_causal:
        first = int(position[0])
        scores[..., first:].masked_fill_(column[first:] > bounds[0], -torch.inf)
    if valid is not None:
        scores.masked_fill_(~valid[:, None, None, None, :seen], -torch.inf)
    attention = scores.softmax(-1)
    lowest, highest = int(start[0]), min(int(stop[-1]), seen)
    near = column[lowest:highest]
    attention[..., lowest:highest].masked_fill_((near >= bounds[1]) & (near < bounds[2]), 0)
    if valid is None:
        return attention.mean(-2)
    looking = valid[:, position.to(key.device)]  # rows of padding count for nothing
    attention.masked_fill_(~looking[:, None, None, :, None], 0)
    return attention.sum(-2) / looking.sum(-1).clamp(min=1)[:, None, None, None]


def _share_budget(
    selection: Selection,
    segment: int,
    far: Tensor,
    valid: Tensor | None,
    affordable: float,
    choice: Choice,
) -> None:
    """Write one segment of a selection.

    far: [B, G, H / G, M'], the attention to far keys. affordable: keys, beyond which it is exact.
    """
    seen = far.shape[-1]
    rank = far.mean(2)
    if valid is None:
        rank[..., : choice.sinks] += 1  # more than any share: these come first
    else:
        usable = valid[:, :seen]
        sinks = usable & (usable.cumsum(-1) <= choice.sinks)
        rank = rank + sinks[:, None] - (~usable)[:, None].to(rank.dtype)
    order = rank.sort(dim=-1, descending=True, stable=True).indices
    by_order = far.gather(-1, order[:, :, None].expand_as(far))
    kept = 1 - far.sum(-1, keepdim=True) + by_order.cumsum(-1)
    needed = ((kept < choice.recall).sum(-1) + 1).clamp(max=seen).flatten(1)
    quantile = round(choice.heads * (needed.shape[1] - 1))
    budget = needed.sort(dim=-1).values[:, quantile].clamp(min=min(choice.sinks, seen))
    if valid is not None:
        budget = budget.minimum(usable.sum(-1))
    most = int(budget.max())  # what lies beyond is never read
    chosen = torch.where(torch.arange(most, device=far.device) < budget[:, None, None],
                         order[..., :most], seen)  # fmt: skip
    recall = kept.gather(
        -1, (budget - 1).clamp(min=0)[:, None, None, None].expand_as(kept[..., :1])
    )
    exact = (budget > affordable) | ~far.isfinite().all(-1).flatten(1).all(-1)
    selection.keys[:, :, segment, :most] = chosen.sort(dim=-1).values.int()
    selection.budget[:, segment] = budget.masked_fill(exact, EXACT).int()
    selection.needed[:, :, segment] = needed.int()
    selection.recall[:, :, segment] = recall[..., 0].flatten(1).masked_fill(exact[:, None], 1)


def active_queries(
    query: Tensor,
    key: Tensor,
    valid: Tensor | None,
    total: Tensor,
    budget: Tensor,
    is_causal: bool,
    scale: float,
    active: float,
    window: int,
    start: int,
    stop: int,
    tail: int,
) -> Tensor:
    """Which queries see every key: bool [B, H, N].

    total: [B, H, N], the log-sum-exp of what each query has seen as a lazy one. Those that miss
    most, of those that may be lazy, are the share `active` of each sample; see `_missed`. In exact
    segments nobody has to be: there every query sees every key.
    """
    heads, queries = total.shape[1:]
    stop = queries if stop < 0 else stop
    row = torch.arange(queries, device=total.device)
    lazy = slice(min(start, queries), max(min(stop, queries - tail), min(start, queries)))
    may_be_lazy = (row >= lazy.start) & (row < lazy.stop)
    chosen = (~may_be_lazy).expand(total.shape)
    count = math.ceil(active * heads * (lazy.stop - lazy.start))
    if count:
        missed = _missed(query, key, valid, total, is_causal, scale, window)
        missed = missed.nan_to_num(nan=torch.inf)[..., lazy].flatten(1)
        most = torch.zeros_like(missed, dtype=torch.bool)
        most.scatter_(1, missed.topk(count, sorted=False).indices, True)
        chosen = chosen.clone()
        chosen[..., lazy] = most.unflatten(1, (heads, -1))
    keys = key.shape[2]
    segment = (row + keys - queries).div(segment_length(keys), rounding_mode="floor").clamp(min=0)
    chosen = chosen & (budget != EXACT)[:, None, segment]
    if valid is not None and is_causal:
        chosen &= valid[:, None, keys - queries :]  # padding asks for nothing
    return chosen


def _missed(
    query: Tensor,
    key: Tensor,
    valid: Tensor | None,
    total: Tensor,
    is_causal: bool,
    scale: float,
    window: int,
) -> Tensor:
    """Estimate of each query's far attention, against what it has seen; a logarithm, [B, H, N].

    As if far keys were normally distributed around their mean m with covariance C:
    log sum exp(q k) = log n + q m + q C q / 2. Sums over whole tiles, a tile's for all its queries.
    Real keys are not, so that only the order of the values is of use.
    """
    groups, keys = key.shape[1:3]
    queries = query.shape[2]
    tiles = -(-keys // TILE)
    padding = tiles * TILE - keys
    seen = key.float() if valid is None else key.float() * valid[:, None, :, None]
    seen = torch.nn.functional.pad(seen, (0, 0, 0, padding)).unflatten(2, (tiles, TILE))
    there = key.new_ones(key.shape[0], keys) if valid is None else valid
    counts = torch.nn.functional.pad(there.float(), (0, padding)).unflatten(1, (tiles, TILE)).sum(2)
    sums = [
        torch.nn.functional.pad(each.cumsum(2), (0,) * (2 * (each.dim() - 3)) + (1, 0))
        for each in (counts[:, None], seen.sum(3), seen.transpose(3, 4) @ seen)
    ]
    own = torch.arange((keys - queries) // TILE, tiles, device=key.device)
    before = (own - -(-window // TILE)).clamp(min=0)
    far = [each[:, :, before] for each in sums]
    if not is_causal:
        behind = (own + 1 + -(-window // TILE)).clamp(max=tiles)
        far = [some + every[:, :, -1:] - every[:, :, behind]
               for some, every in zip(far, sums, strict=True)]  # fmt: skip
    count = far[0].clamp(min=1)[..., None]  # [B, 1, T, 1]
    mean = far[1] / count  # [B, G, T, D]
    covariance = far[2] / count[..., None] - mean[..., None] * mean[..., None, :]
    lead, behind_last = (keys - queries) % TILE, padding
    rows = torch.nn.functional.pad(query.float() * scale, (0, 0, lead, behind_last))
    rows = rows.unflatten(1, (groups, -1)).unflatten(3, (len(own), TILE))  # [B, G, R, T, TILE, D]
    along = (rows @ mean[:, :, None, :, :, None])[..., 0]
    spread = ((rows @ covariance[:, :, None]) * rows).sum(-1)
    estimate = along + spread / 2 + far[0].log()[:, :, None, :, None]
    estimate = estimate.flatten(3, 4)[..., lead : lead + queries].flatten(1, 2)
    return estimate - total


def _exact(key: Tensor, heads: int, segments: int) -> Selection:
    batch, groups, keys = key.shape[:3]
    return Selection(
        key.new_zeros(batch, groups, segments, keys, dtype=torch.int32),
        key.new_full((batch, segments), EXACT, dtype=torch.int32),
        key.new_ones(batch, heads, segments, dtype=torch.float32),
        key.new_full((batch, heads, segments), keys, dtype=torch.int32),
    )
