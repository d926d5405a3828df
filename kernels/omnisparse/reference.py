"""OmniSparse attention in plain torch: every pair, and a mask. The oracle of the fast forms."""

from __future__ import annotations

import torch
from torch import Tensor

from .selection import Selection, neighbourhood

__all__ = ["attend", "visible"]


def visible(selection: Selection, queries: int, is_causal: bool, window: int, sinks: int) -> Tensor:
    """Which keys each query looks at: bool [B, G, N, M]."""
    batch, groups, keys = selection.keys.shape
    device = selection.keys.device
    column = torch.arange(keys, device=device)
    position = torch.arange(keys - queries, keys, device=device)[:, None]
    start, stop = neighbourhood(position, keys, window, is_causal)
    near = (column >= start) & (column < stop)
    rank = torch.arange(keys, device=device)
    selected = torch.zeros(batch, groups, keys, dtype=torch.bool, device=device)
    selected.scatter_(-1, selection.keys.long(), (rank < selection.budget).expand_as(selected))
    far = torch.where(
        selection.active[..., None], selected[:, :, None], (selected & (column < sinks))[:, :, None]
    )
    allowed = near | far
    return allowed & (column <= position) if is_causal else allowed


def attend(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention [B, H, N, D] and its log-sum-exp [B, H, N]; zero and -inf for rows without keys."""
    group = query.shape[1] // key.shape[1]
    key, value, allowed = (each.repeat_interleave(group, 1) for each in (key, value, allowed))
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~allowed, -torch.inf)
    total = scores.logsumexp(-1)
    weights = (scores - total.clamp(min=torch.finfo(scores.dtype).min)[..., None]).exp()
    return weights @ value, total
