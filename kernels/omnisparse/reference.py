"""OmniSparse attention in plain torch: every pair, and a mask. The oracle of the fast forms.

It is also what files hold that must run without accel: the same results, but no gain. GPUs use
its ranking of all segments at once (`choose`), too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .selection import (
    EXACT,
    PROBES,
    TRIED,
    WORTH,
    Choice,
    active_queries,
    neighbourhood,
    segment_count,
    segment_length,
)

__all__ = [
    "attend",
    "choose",
    "omnisparse_attend",
    "omnisparse_select",
    "probe_rows",
    "probe_shares",
    "visible",
]


def visible(
    keys: Tensor,
    budget: Tensor,
    active: Tensor,
    valid: Tensor | None,
    is_causal: bool,
    window: int,
) -> Tensor:
    """Which keys each query looks at: bool [B, H, N, M].

    keys, budget: a `Selection`'s; active: bool [B, H, N]; valid: bool [B, M] or None.
    """
    count, (heads, queries) = keys.shape[-1], active.shape[1:]
    column = torch.arange(count, device=keys.device)
    position = torch.arange(count - queries, count, device=keys.device)
    start, stop = neighbourhood(position[:, None], count, window, is_causal)
    near = (column >= start) & (column < stop)  # [N, M]
    chosen = column < budget[:, None, :, None]  # of each segment's list, so many
    selected = torch.zeros(*keys.shape[:-1], count + 1, dtype=torch.bool, device=keys.device)
    selected.scatter_(-1, keys.long().where(chosen, count), True)
    segment = position.div(segment_length(count), rounding_mode="floor").clamp(min=0)
    group = heads // keys.shape[1]
    far = selected[:, :, segment, :count].repeat_interleave(group, 1)  # [B, H, N, M]
    exact = (budget == EXACT)[:, None, segment]
    allowed = near | far | (active | exact)[..., None]
    if is_causal:
        allowed &= column <= position[:, None]
    return allowed if valid is None else allowed & valid[:, None, None]


def attend(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention [B, H, N, D] and its log-sum-exp [B, H, N]; zero and -inf for rows without keys."""
    group = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(group, 1) for each in (key, value))
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~allowed, -torch.inf)
    total = scores.logsumexp(-1)
    weights = (scores - total.clamp(min=torch.finfo(scores.dtype).min)[..., None]).exp()
    return weights @ value, total


class _Segments(NamedTuple):
    """Positions: first, last, start, stop: int64 [S], of its queries and of its neighbourhood."""

    first: Tensor
    last: Tensor
    start: Tensor
    stop: Tensor

    @staticmethod
    def of(query: Tensor, key: Tensor, window: int) -> _Segments:
        keys = key.shape[2]
        length, offset = segment_length(keys), keys - query.shape[2]
        begin = length * torch.arange(segment_count(keys), device=key.device)
        end = begin + length
        return _Segments(
            begin.clamp(min=offset), end.clamp(max=keys), (begin - window).clamp(min=0),
            end.clamp(max=keys) + window,
        )  # fmt: skip

    def far(self, keys: int, is_causal: bool) -> Tensor:
        """[S, M]."""
        place = torch.arange(keys, device=self.first.device)
        before = place < self.start[:, None]
        return before if is_causal else before | (place >= self.stop[:, None])

    def probes(self, offset: int) -> Tensor:
        """Rows of the queries that are probes, int64 [S, PROBES]; -1 where there are fewer."""
        step = torch.arange(1, PROBES + 1, device=self.first.device)
        position = (self.first - 1)[:, None] + step * (self.last - self.first)[:, None] // PROBES
        before = torch.cat([(self.first - 1)[:, None], position[:, :-1]], 1)
        return (position - offset).where(position != before, -1)


def omnisparse_select(
    query: Tensor,
    key: Tensor,
    valid: Tensor | None,
    is_causal: bool,
    scale: float,
    recall: float,
    active: float,
    heads: float,
    window: int,
    sinks: int,
    lazy: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`accel::omnisparse_select`, all segments at once; its results are a `Selection`'s.

    Needs as many numbers as an eighth of all pairs.
    """
    share = None
    if lazy != "local":
        share = probe_shares(query, key, valid, probe_rows(query, key), is_causal, scale)
    return choose(
        query, key, share, valid, is_causal, Choice(recall, active, heads, window, sinks, lazy)
    )


def probe_rows(query: Tensor, key: Tensor) -> Tensor:
    """Rows of the queries that are probes, int64 [S, PROBES]; -1 where a segment has fewer."""
    return _Segments.of(query, key, 0).probes(key.shape[2] - query.shape[2])


def probe_shares(
    query: Tensor, key: Tensor, valid: Tensor | None, rows: Tensor, is_causal: bool, scale: float
) -> Tensor:
    """How much attention a segment's probes pay to each key, on average: float32 [B, H, S, M]."""
    groups, keys = key.shape[1:3]
    place = torch.arange(keys, device=key.device)
    position = rows.clamp(min=0) + keys - query.shape[2]
    there = key.new_ones(len(key), keys, dtype=torch.bool) if valid is None else valid
    looking = (rows >= 0).expand(len(key), -1, -1)  # [B, S, P]
    if is_causal:
        looking = looking & there[:, position.clamp(min=0)]
    probes = (query * scale)[:, :, rows.clamp(min=0).flatten()].unflatten(1, (groups, -1))
    scores = (probes @ key[:, :, None].transpose(-1, -2)).float()
    scores = scores.unflatten(3, rows.shape)  # [B, G, H / G, S, P, M]
    hidden = ~there[:, None, None, None, None]
    if is_causal:
        hidden = hidden | (place > position[..., None])
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    weights = weights.masked_fill(~looking[:, None, None, ..., None], 0)
    share = weights.sum(4) / looking.sum(-1).clamp(min=1)[:, None, None, :, None]
    return share.flatten(1, 2)


def choose(
    query: Tensor, key: Tensor, share: Tensor | None, valid: Tensor | None, is_causal: bool,
    choice: Choice,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """A `Selection`'s, from `probe_shares`; None for keys that are all alike."""
    groups, keys = key.shape[1:3]
    length, segments = segment_length(keys), segment_count(keys)
    offset = keys - query.shape[2]
    place = torch.arange(keys, device=key.device)
    number = torch.arange(segments, device=key.device)
    own = _Segments.of(query, key, choice.window)
    far = own.far(keys, is_causal)
    there = key.new_ones(len(key), keys, dtype=torch.bool) if valid is None else valid
    usable = there[:, None] & far  # [B, S, M]
    first_ones = usable & (there.cumsum(-1) <= choice.sinks)[:, None]
    if share is None:
        share = key.new_zeros(*query.shape[:2], segments, keys, dtype=torch.float32)
    share = share.masked_fill(~far, 0).unflatten(1, (groups, -1))  # [B, G, H / G, S, M]
    rank = share.mean(2) + first_ones[:, None].float() - (~usable)[:, None].float()
    order = rank.sort(dim=-1, descending=True).indices  # [B, G, S, M]; ONNX has no stable one
    by_order = share.gather(-1, order[:, :, None].expand_as(share))
    sums = torch.nn.functional.pad(by_order, (1, 0)).cumsum(-1)
    kept = (1 - share.sum(-1, keepdim=True) + sums).flatten(1, 2)  # [B, H, S, 1 + M]
    needed = (kept < choice.recall).sum(-1).minimum(far.sum(-1))  # [B, H, S]
    budget = needed.sort(dim=1).values[:, round(choice.heads * (query.shape[1] - 1))]
    budget = budget.maximum(first_ones.sum(-1)).minimum(usable.sum(-1))  # [B, S]
    dense = (own.first + own.last) / 2 if is_causal else keys + 0 * own.first
    near = choice.window + length / 2 if is_causal else 2 * choice.window + length
    affordable = (WORTH - choice.active) * dense - near
    exact = (budget > affordable) | ~share.isfinite().all(-1).all(1).all(1)
    exact = exact | (affordable <= choice.sinks) | (own.last <= offset) | ~far.any(-1)
    exact = exact | (exact | (number < segments - TRIED)).all()
    if choice.recall >= 1 or choice.active >= 1 or offset < 0:
        exact = torch.ones_like(exact)
    chosen = order.where(place < budget[:, None, :, None], keys).sort(-1).values
    reached = kept.gather(-1, budget[:, None, :, None].expand_as(kept[..., :1]))
    reached = reached[..., 0].masked_fill(exact[:, None], 1)
    return chosen.int(), budget.masked_fill(exact, EXACT).int(), reached, needed.int()


def omnisparse_attend(
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
    """`accel::omnisparse_attend`, with the results of `cpu.forward`."""
    nobody = torch.zeros(query.shape[:3], dtype=torch.bool, device=query.device)
    lazily = visible(keys, budget, nobody, valid, is_causal, window)
    _, total = attend(query, key, value, lazily, scale)
    chosen = active_queries(query, key, valid, visual, total, budget, is_causal, scale,
                            active, window, start, stop, tail)  # fmt: skip
    allowed = visible(keys, budget, chosen, valid, is_causal, window)
    return *attend(query, key, value, allowed, scale), chosen
