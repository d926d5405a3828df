"""Training one recommender, static or dynamic, and choosing its epoch on the validation items."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .data import MovieLens
from .measure import Ranking, ranking, scores_of

__all__ = ["Recipe", "trained"]

NDCG_10 = 1  # of `Ranking.ndcg`


class Recipe:
    """The same for all models. An epoch is as many examples, drawn anew each time. The rate falls
    to 0 along a cosine over all steps, so that training ends where it has settled, and not where a
    measure on few users happens to be high. Every few epochs (`ranked`) the validation items are
    ranked; the best of these epochs is kept."""

    epochs = 30
    examples = 16_384
    batch = 256
    negatives = 64
    rate = 2e-3
    weight_decay = 1e-4
    ranked = 3
    code_weight = 0.1


def trained(
    model: nn.Module, films: MovieLens, seed: int, progress: Callable[[str], None] = print
) -> tuple[nn.Module, Ranking, list[tuple[int, float, float]]]:
    """Train in place. Returns the model as of its best epoch, its ranking of the test items, and
    for each epoch that was ranked its number, loss, and NDCG@10 on the validation items."""
    recipe = Recipe()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.rate, weight_decay=recipe.weight_decay
    )
    steps = recipe.epochs * -(-recipe.examples // recipe.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    users, places = films.examples()
    validation = films.held_out(2)
    best, kept, curve = -1.0, copy.deepcopy(model.state_dict()), []
    for epoch in range(1, recipe.epochs + 1):
        model.train()
        chosen = torch.randperm(len(users), generator=generator)[: recipe.examples]
        total = 0.0
        for some in chosen.split(recipe.batch):
            histories, targets = films.histories(users[some], places[some])
            negatives = torch.randint(
                1, films.items, (len(some), recipe.negatives), generator=generator
            )
            candidates = torch.cat([targets[:, None], negatives], 1)
            scores, code_loss = _called(model, histories, candidates)
            # A negative that is the target is none.
            scores = scores.masked_fill(
                (candidates == targets[:, None]) & (torch.arange(candidates.shape[1]) > 0),
                -torch.inf,
            )
            first = torch.zeros(len(some), dtype=torch.long)
            loss = nn.functional.cross_entropy(scores, first) + recipe.code_weight * code_loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        if epoch % recipe.ranked:
            continue
        model.eval()
        found = _ranked(model, films, validation).ndcg[NDCG_10]
        curve.append((epoch, total * recipe.batch / recipe.examples, found))
        progress(f"epoch {epoch}: loss {curve[-1][1]:.4f}, validation NDCG@10 {found:.4f}")
        if found > best:
            best, kept = found, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    return model, _ranked(model.eval(), films, films.held_out(1)), curve


def _called(model: Any, histories: torch.Tensor, candidates: torch.Tensor) -> Any:
    if hasattr(model, "with_code_loss"):
        return model.with_code_loss(histories, candidates)
    return model(histories, candidates), torch.zeros(())


def _ranked(
    model: nn.Module, films: MovieLens, held_out: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> Ranking:
    histories, targets, seen = held_out
    return ranking(scores_of(model, histories, films.items), targets, seen)
