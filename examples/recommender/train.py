"""Training one recommender, static or dynamic, and choosing its epoch on the validation items."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...compiler.extras import optional
from ...compiler.models.solid import DynamicModel
from .data import MovieLens
from .measure import Ranking, ranking, scores_of

__all__ = ["Objective", "Recipe", "trained"]

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


class Objective(nn.Module):
    """A model, called for its loss: that is what DDP has to wrap."""

    def __init__(self, model: nn.Module, code_weight: float) -> None:
        super().__init__()
        self.model = model
        self.code_weight = code_weight

    def forward(self, histories: Tensor, candidates: Tensor) -> Tensor:
        """candidates: int64 [B, C], the first of which was watched. Returns the mean loss."""
        if isinstance(self.model, DynamicModel):
            scores, code_loss = self.model.with_code_loss(histories, candidates)
        else:
            scores, code_loss = self.model(histories, candidates), torch.zeros(())
        # A negative that is the target is none.
        others = torch.arange(candidates.shape[1], device=candidates.device) > 0
        scores = scores.masked_fill((candidates == candidates[:, :1]) & others, -torch.inf)
        first = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
        loss: Tensor = nn.functional.cross_entropy(scores, first) + self.code_weight * code_loss
        return loss


def trained(
    model: nn.Module, films: MovieLens, seed: int, progress: Callable[[str], None] = print
) -> tuple[nn.Module, Ranking, list[tuple[int, float, float]]]:
    """Train in place. Returns the model as of its best epoch, its ranking of the test items, and
    for each epoch that was ranked its number, loss, and NDCG@10 on the validation items.

    By accelerate: started by `accelerate launch`, each process takes its share of every batch, and
    what is learnt is what one process learns (the codebook's loss is a mean over each process'
    items, which are as many only where histories are full).
    """
    accelerate: Any = optional("accelerate", "bench")
    recipe = Recipe()
    accelerator = accelerate.Accelerator(cpu=True)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.rate, weight_decay=recipe.weight_decay
    )
    objective, optimizer = accelerator.prepare(Objective(model, recipe.code_weight), optimizer)
    steps = recipe.epochs * -(-recipe.examples // recipe.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.optimizer, steps)
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
            own = slice(accelerator.process_index, None, accelerator.num_processes)
            loss = objective(histories[own], candidates[own])
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            total += float(accelerator.reduce(loss.detach(), "mean"))
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


def _ranked(model: nn.Module, films: MovieLens, held_out: tuple[Tensor, Tensor, Tensor]) -> Ranking:
    histories, targets, seen = held_out
    return ranking(scores_of(model, histories, films.items), targets, seen)
