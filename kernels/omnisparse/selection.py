"""Which keys and queries OmniSparse attention looks at: found cheaply, from a few probe rows.

The paper (arXiv 2511.12201) was available as an abstract only: queries are lazy or active, and the
flattest head sets one key budget for all heads. The rules by which that is decided here are ours.

Positions come in *segments*, runs of `segment_length`. A query always sees its *neighbourhood*: its
segment and `window` keys before (and, where attention is not causal, after) that. Everything beyond
is *far*. Of the far keys a lazy query sees those that were selected for its segment; an active
query sees them all.
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
    "Choice",
    "Selection",
    "SelectionSummary",
    "active_queries",
    "by_rank",
    "exact_selection",
    "mean_attention",
    "neighbourhood",
    "segment_count",
    "segment_length",
    "select",
    "shared_budget",
]

SEGMENT = 256  # queries that share a neighbourhood and selected keys, up to SEGMENTS * SEGMENT keys
SEGMENTS = 64  # at most, so that what is kept of the selection grows with the number of keys only
PROBES = 32  # rows of each segment whose attention is computed
TRIED = 4  # last segments which, if all of them have to be exact, make all others exact
WORTH = 0.7  # share of all pairs above which a segment is exact: an upper bound of what pays
EXACT = -1  # a budget: every key
LAZY = ("selected", "local")


class Selection(NamedTuple):
    """What is looked at. B: batch, G: key/value heads, H: query heads, M: keys, S: segments.

    keys: int32 [B, G, S, M]; the first `budget` of each row are the selected keys, ascending. All
    of them are far from the segment, before it where attention is causal, and none is padding.
    budget: int32 [B, S], the number that all heads share; `EXACT` where every key is seen.
    recall: float32 [B, H, S], the share of the probe rows' attention that is kept.
    needed: int32 [B, H, S], the budget at which each head alone reaches the asked recall.
    """

    keys: Tensor
    budget: Tensor
    recall: Tensor
    needed: Tensor


@dataclass(frozen=True)
class SelectionSummary:
    """A `Selection`, its samples and segments together.

    exact: the share of the segments that stayed exact. Of the others: budget: mean number of keys
    that were selected; flattest, median: mean number of keys that such a head alone needed; recall:
    the lowest of the heads' mean shares of attention that are kept. Where all are exact the first
    three are NaN.
    """

    exact: float
    budget: float
    flattest: float
    median: float
    recall: float

    @staticmethod
    def of(budget: Tensor, recall: Tensor, needed: Tensor) -> SelectionSummary:
        """These are a `Selection`'s."""
        exact = budget == EXACT  # [B, S]
        if bool(exact.all()):
            return SelectionSummary(1.0, math.nan, math.nan, math.nan, 1.0)
        sparse = ~exact
        own = needed.float().transpose(1, 2)[sparse]  # [sparse segments, H]
        return SelectionSummary(
            exact=float(exact.float().mean()),
            budget=float(budget[sparse].float().mean()),
            flattest=float(own.amax(1).mean()),
            median=float(own.median(1).values.mean()),
            recall=float(recall.transpose(1, 2)[sparse].mean(0).min()),
        )


@dataclass(frozen=True)
class Choice:
    """How to select.

    recall: share of each head's attention that lazy queries keep, in (0, 1]; 1 is exact attention.
    active: share of the queries that see every key, in [0, 1]: those that would miss most.
    heads: the quantile of the heads' budgets that all get; 1 is the flattest head's.
    window: keys of the neighbourhood beyond the segment. sinks: first keys, always selected.
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
    """The neighbourhoods [start, stop) of queries at these positions.

    Positions before the first key (of queries that outnumber the keys) count as in its segment.
    """
    length = segment_length(keys)
    first = position.div(length, rounding_mode="floor").clamp(min=0) * length
    start = (first - window).clamp(min=0)
    stop = position + 1 if is_causal else (first + length + window).clamp(max=keys)
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
    `WORTH` of all pairs would be left: short ones, and those with large budgets. Where the last
    `TRIED` are, all are: a layer that can't gain costs little.
    """
    heads, queries = query.shape[1:3]
    batch, groups, keys = key.shape[:3]
    length = segment_length(keys)
    segments = segment_count(keys)
    selection = exact_selection(key, heads, segments)
    if choice.recall >= 1 or choice.active >= 1 or queries > keys:
        return selection
    for tried, segment in enumerate(reversed(range((keys - queries) // length, segments))):
        if tried == TRIED and bool((selection.budget == EXACT).all()):
            break
        first, last = max(segment * length, keys - queries), min((segment + 1) * length, keys)
        dense = (first + last) / 2 if is_causal else keys
        near = choice.window + length / 2 if is_causal else 2 * choice.window + length
        affordable = (WORTH - choice.active) * dense - near
        if affordable <= choice.sinks:
            break  # those before it are shorter
        place = torch.arange(last if is_causal else keys, device=key.device)
        start, stop = max(segment * length - choice.window, 0), last + choice.window
        place = torch.cat([place[:start], place[stop:]])
        if not len(place):
            break  # nothing is far
        if choice.lazy == "local":
            far = torch.zeros(batch, groups, heads // groups, len(place), device=key.device)
        else:
            rows = first - 1 + torch.arange(1, PROBES + 1) * (last - first) // PROBES
            rows = rows[rows >= first].unique()  # of fewer rows all
            attention = mean_attention(query, key, valid, rows, is_causal, scale)
            far = torch.cat([attention[..., :start], attention[..., stop:]], -1)
        _share_budget(selection, segment, place, far, valid, affordable, choice)
    return selection


def mean_attention(
    query: Tensor,
    key: Tensor,
    valid: Tensor | None,
    position: Tensor,
    is_causal: bool,
    scale: float,
) -> Tensor:
    """How much attention the probe rows at these positions pay to each key, on average:
    [B, G, H / G, keys up to the last row's]."""
    groups, keys = key.shape[1:3]
    seen = int(position[-1]) + 1 if is_causal else keys
    rows = (position - (keys - query.shape[2])).to(key.device)
    probes = (query[:, :, rows] * scale).unflatten(1, (groups, -1)).flatten(2, 3)
    scores = (probes @ key[:, :, :seen].transpose(-1, -2)).float().unflatten(2, (-1, len(rows)))
    if is_causal:
        first = int(position[0])
        later = torch.arange(first, seen) > position[:, None]
        scores[..., first:].masked_fill_(later.to(key.device), -torch.inf)
    if valid is None:
        return scores.softmax(-1).mean(-2)
    attention = scores.masked_fill_(~valid[:, None, None, None, :seen], -torch.inf).softmax(-1)
    if not is_causal:  # the keys need not be the queries' own: who is padding is not known
        return attention.mean(-2)
    looking = valid[:, position.to(key.device)]  # rows of padding count for nothing
    attention.masked_fill_(~looking[:, None, None, :, None], 0)
    return attention.sum(-2) / looking.sum(-1).clamp(min=1)[:, None, None, None]


def _share_budget(
    selection: Selection,
    segment: int,
    place: Tensor,
    far: Tensor,
    valid: Tensor | None,
    affordable: float,
    choice: Choice,
) -> None:
    """Write one segment of a selection.

    place: [M'], the keys that are far from it. far: [B, G, H / G, M'], the attention to them.
    affordable: keys, beyond which the segment is exact.
    """
    count = len(place)
    there = torch.ones_like(selection.keys[:, 0, 0], dtype=torch.bool) if valid is None else valid
    usable = there[:, place]
    sinks = usable & (there.cumsum(-1)[:, place] <= choice.sinks)
    # A rank beyond all shares of attention, for what comes first and last in any case.
    rank = far.mean(2) + sinks[:, None].float() - (~usable)[:, None].float()
    order, kept = by_rank(far, rank)
    kept = kept + 1 - far.sum(-1, keepdim=True)
    needed = (kept < choice.recall).sum(-1).clamp(max=count).flatten(1)
    budget = shared_budget(needed, choice.heads).maximum(sinks.sum(-1)).minimum(usable.sum(-1))
    most = int(budget.max())  # what lies beyond is never read
    listed = torch.arange(most, device=far.device) < budget[:, None, None]
    chosen = place[order[..., :most]].where(listed, selection.keys.shape[-1])
    recall = kept.gather(-1, budget[:, None, None, None].expand_as(kept[..., :1]))
    exact = (budget > affordable) | ~far.isfinite().all(-1).flatten(1).all(-1)
    selection.keys[:, :, segment, :most] = chosen.sort(dim=-1).values.int()
    selection.budget[:, segment] = budget.masked_fill(exact, EXACT).int()
    selection.needed[:, :, segment] = needed.int()
    selection.recall[:, :, segment] = recall[..., 0].flatten(1).masked_fill(exact[:, None], 1)


def by_rank(attention: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """Keys with the highest rank first, and how much attention 0, 1, .. of them get together.

    attention: [B, G, H / G, M]; rank: [B, G, M]. Returns [B, G, M] and [B, G, H / G, 1 + M].
    """
    order = rank.sort(dim=-1, descending=True, stable=True).indices
    by_order = attention.gather(-1, order[:, :, None].expand_as(attention))
    return order, torch.nn.functional.pad(by_order, (1, 0)).cumsum(-1)


def shared_budget(needed: Tensor, heads: float) -> Tensor:
    """The quantile `heads` of what the heads need, [B, H]: [B]; 1 is the flattest head's."""
    return needed.sort(dim=-1).values[:, round(heads * (needed.shape[1] - 1))]


def active_queries(
    query: Tensor,
    key: Tensor,
    valid: Tensor | None,
    visual: Tensor | None,
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

    visual: bool [B, N] or None, queries that may be lazy; so must be those in [start, stop), and
    never are the last `tail`. total: [B, H, N], the log-sum-exp of what each query has seen as a
    lazy one. Those that miss most, of those that may be lazy, are the share `active` of each
    sample; see `_missed`. In exact segments nobody has to be: there every query sees every key.
    """
    heads, queries = total.shape[1:]
    keys = key.shape[2]
    stop = queries if stop < 0 else stop
    row = torch.arange(queries, device=total.device)
    segment = (row + keys - queries).div(segment_length(keys), rounding_mode="floor").clamp(min=0)
    exact = (budget == EXACT)[:, None, segment]
    idle = torch.zeros_like(exact)
    if valid is not None and is_causal:
        idle = ~valid[:, None, keys - queries :]  # padding asks for nothing
    lazy = slice(min(start, queries), max(min(stop, queries - tail), min(start, queries)))
    may_be_lazy = ((row >= lazy.start) & (row < lazy.stop)).expand(len(query), -1)
    if visual is not None:
        may_be_lazy = may_be_lazy & visual
    chosen = (~may_be_lazy)[:, None].expand(total.shape)
    most = math.ceil(active * heads * (lazy.stop - lazy.start))
    if most:
        missed = _missed(query, key, valid, total, is_causal, scale, window)
        missed = missed.nan_to_num(nan=torch.inf).masked_fill(exact | idle | chosen, -torch.inf)
        missed = missed[..., lazy].flatten(1)
        counts = (active * heads * may_be_lazy.sum(-1, keepdim=True).double()).ceil()
        among = torch.arange(most, device=total.device) < counts
        picked = torch.zeros_like(missed, dtype=torch.bool)
        picked.scatter_(1, missed.topk(most).indices, among)
        picked = torch.nn.functional.pad(
            picked.unflatten(1, (heads, -1)), (lazy.start, queries - lazy.stop)
        )
        chosen = chosen | picked
    return chosen & ~(exact | idle)


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
    log sum exp(q k) = log n + q m + q C q / 2. Real keys are not, so that only the order of the
    values is of use.
    """
    groups, keys = key.shape[1:3]
    queries = query.shape[2]
    length, segments = segment_length(keys), segment_count(keys)
    there = key.new_ones(len(key), keys) if valid is None else valid
    # With a constant 1 before each key, one product has their number, their sum and their squares.
    rows = torch.cat([there.new_ones(1).expand(*key.shape[:3], 1), key], -1).float()
    rows = rows * there[:, None, :, None]
    behind = segments * length - keys
    if is_causal:
        parts = torch.nn.functional.pad(rows, (0, 0, window, behind))[:, :, : segments * length]
        parts = parts.unflatten(2, (segments, length))  # each ends where a neighbourhood starts
        moments = parts.transpose(3, 4) @ parts
        moments = moments.cumsum(2) - moments
    else:
        parts = torch.nn.functional.pad(rows, (0, 0, window, behind + window))
        parts = parts.unfold(2, length + 2 * window, length)  # the neighbourhoods
        moments = (rows.transpose(2, 3) @ rows)[:, :, None] - parts @ parts.transpose(3, 4)
    offset = keys - queries
    own = torch.arange(offset // length, segments, device=key.device).clamp(min=0)
    moments = moments[:, :, None, own]  # [B, G, 1, S', 1 + D, 1 + D]
    number = moments[..., :1, :1].clamp(min=1)
    mean = moments[..., 1:, :1] / number
    covariance = moments[..., 1:, 1:] / number - mean * mean.transpose(-1, -2)
    lead = offset % length
    asking = torch.nn.functional.pad(query.float() * scale, (0, 0, lead, behind))
    asking = asking.unflatten(1, (groups, -1)).unflatten(3, (len(own), length))
    spread = ((asking @ covariance) * asking).sum(-1)
    estimate = (asking @ mean)[..., 0] + spread / 2 + number.log()[..., 0]
    estimate = estimate.flatten(3, 4)[..., lead : lead + queries].flatten(1, 2)
    return estimate - total


def exact_selection(key: Tensor, heads: int, segments: int) -> Selection:
    """Of so many query heads, every key."""
    batch, groups, keys = key.shape[:3]
    return Selection(
        key.new_zeros(batch, groups, segments, keys, dtype=torch.int32),
        key.new_full((batch, segments), EXACT, dtype=torch.int32),
        key.new_ones(batch, heads, segments, dtype=torch.float32),
        key.new_full((batch, heads, segments), keys, dtype=torch.int32),
    )
