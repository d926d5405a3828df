"""OmniSparse attention in plain torch: every pair, and a mask. The oracle of the fast forms."""

from __future__ import annotations

import torch
from torch import Tensor

from .selection import EXACT, neighbourhood, segment_length

__all__ = ["attend", "visible"]


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
