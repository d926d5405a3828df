"""How well held-out items are ranked among all that a user has not seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CUTS", "Ranking", "ranking", "scores_of"]

CUTS = (5, 10, 20)


@dataclass(frozen=True)
class Ranking:
    """auc: of all users' scores together; uauc: mean of each user's. hit_rate, ndcg: at CUTS."""

    auc: float
    uauc: float
    hit_rate: tuple[float, ...]
    ndcg: tuple[float, ...]


@torch.no_grad()
def scores_of(
    model: Callable[[Tensor, Tensor], Tensor], histories: Tensor, items: int, batch: int = 8
) -> Tensor:
    """Scores of the whole catalogue, [users, items]."""
    rows = []
    for some in histories.split(batch):
        rows.append(model(some, torch.arange(items).expand(len(some), -1)))
    return torch.cat(rows)


def ranking(scores: Tensor, held_out: Tensor, seen: Tensor) -> Ranking:
    """scores: [users, items]. held_out: int64 [users]. seen: bool [users, items], left out.

    Ties count half.
    """
    own = scores.gather(1, held_out[:, None])
    others = ~seen
    others[torch.arange(len(held_out)), held_out] = False
    above = ((scores > own) & others).sum(1) + 0.5 * ((scores == own) & others).sum(1)
    uauc = 1 - above / others.sum(1)
    negatives = scores[others].sort().values
    place = torch.searchsorted(negatives, own[:, 0].contiguous())
    place = place + torch.searchsorted(negatives, own[:, 0].contiguous(), right=True)
    gain = 1 / torch.log2(above + 2)
    return Ranking(
        auc=float((place / 2 / len(negatives)).mean()),
        uauc=float(uauc.mean()),
        hit_rate=tuple(float((above < cut).float().mean()) for cut in CUTS),
        ndcg=tuple(float((gain * (above < cut)).mean()) for cut in CUTS),
    )
