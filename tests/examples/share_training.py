"""Started by test_distributed.py as several processes, each of which trains its share."""

from __future__ import annotations

import json

import torch
from accel.compiler.models.solid import dynamize
from accel.examples.recommender.backbones import BACKBONES, DYNAMIC
from accel.examples.recommender.data import LENGTH, MovieLens
from accel.examples.recommender.train import Recipe, trained
from torch import Tensor


class Full(MovieLens):
    """Histories are longer than is read of them: batches that hold no padding have as many items
    on each process."""

    def examples(self) -> tuple[Tensor, Tensor]:
        users, places = super().examples()
        return users[places >= LENGTH], places[places >= LENGTH]


def main() -> None:
    torch.set_num_threads(1)
    items, users = 40, 4
    torch.manual_seed(0)
    watched = tuple(torch.randint(1, items, (LENGTH + 8,)) for _ in range(users))
    films = Full(users=watched, titles=("",) * items, genres=((),) * items)
    labels = torch.arange(items) % 5
    model = dynamize(
        BACKBONES["GRU4Rec"](items), DYNAMIC, history="history", items=items, semantics=labels,
        codebook=torch.randn(5, 32),
    )  # fmt: skip
    Recipe.epochs, Recipe.ranked, Recipe.batch = 3, 1, 8
    _, found, curve = trained(model, films, 0, progress=lambda _: None)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(json.dumps({"loss": [loss for _, loss, _ in curve], "uauc": found.uauc}))


if __name__ == "__main__":
    main()
