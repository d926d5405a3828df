"""OmniSparse attention in plain torch: every pair, and a mask. The oracle of the fast forms.

It is also what files hold that must run without accel: the same results, but no gain.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .selection import (
    EXACT,
    PROBES,
    TRIED,
    WORTH,
    active_queries,
    neighbourhood,
    segment_count,
    segment_length,
)

__all__ = ["attend", "omnisparse_attend", "omnisparse_select", "visible"]


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
    groups, keys = key.shape[1:3]
    length, segments = segment_length(keys), segment_count(keys)
    offset, group = keys - query.shape[2], query.shape[1] // groups
    place = torch.arange(keys, device=key.device)
    number = torch.arange(segments, device=key.device)
    first, last = (number * length).clamp(min=offset), ((number + 1) * length).clamp(max=keys)
    start, stop = (number * length - window).clamp(min=0), last + window
    far = place < start[:, None]
    if not is_causal:
        far = far | (place >= stop[:, None])
    there = key.new_ones(len(key), keys, dtype=torch.bool) if valid is None else valid
    usable = there[:, None] & far  # [B, S, M]
    first_ones = usable & (there.cumsum(-1) <= sinks)[:, None]
    share = key.new_zeros(len(key), groups, group, segments, keys, dtype=torch.float32)
    if lazy != "local":
        step = torch.arange(1, PROBES + 1, device=key.device)
        rows = first[:, None] - 1 + step * (last - first)[:, None] // PROBES
        before = torch.cat([first[:, None] - 1, rows[:, :-1]], 1)
        looking = (rows != before).expand(len(key), -1, -1)  # [B, S, P]
        if is_causal:
            looking = looking & there[:, rows.clamp(min=0)]
        probes = (query * scale)[:, :, (rows - offset).clamp(min=0).flatten()]
        scores = probes.unflatten(1, (groups, group)) @ key[:, :, None].transpose(-1, -2)
        scores = scores.float().unflatten(3, (segments, PROBES))  # [B, G, H / G, S, P, M]
        hidden = ~there[:, None, None, None, None]
        if is_causal:
            hidden = hidden | (place > rows[..., None])
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        weights = weights.masked_fill(~looking[:, None, None, ..., None], 0)
        share = weights.sum(4) / looking.sum(-1).clamp(min=1)[:, None, None, :, None]
        share = share.masked_fill(~far, 0)
    rank = share.mean(2) + first_ones[:, None].float() - (~usable)[:, None].float()
    order = rank.sort(dim=-1, descending=True).indices  # [B, G, S, M]; ONNX has no stable one
    by_order = share.gather(-1, order[:, :, None].expand_as(share))
    sums = torch.nn.functional.pad(by_order, (1, 0)).cumsum(-1)
    kept = (1 - share.sum(-1, keepdim=True) + sums).flatten(1, 2)  # [B, H, S, 1 + M]
    needed = (kept < recall).sum(-1).minimum(far.sum(-1))  # [B, H, S]
    budget = needed.sort(dim=1).values[:, round(heads * (query.shape[1] - 1))]
    budget = budget.maximum(first_ones.sum(-1)).minimum(usable.sum(-1))  # [B, S]
    dense = (first + last) / 2 if is_causal else keys + 0 * first
    near = window + length / 2 if is_causal else 2 * window + length
    affordable = (WORTH - active) * dense - near
    exact = (budget > affordable) | ~share.isfinite().all(-1).all(1).all(1)
    exact = exact | (affordable <= sinks) | (last <= offset) | ~far.any(-1)
    exact = exact | (exact | (number < segments - TRIED)).all()
    if recall >= 1 or active >= 1 or offset < 0:
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
