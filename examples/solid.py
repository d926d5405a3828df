"""A recommender with layers of each user's own: trained, compiled, exported, and asked.

    python -m accel.examples.solid

trains SASRec on MovieLens-100k with SOLID, first by genres alone, then with the codebook that this
has learnt (some 4 minutes); says how well both rank what users watched next; compiles the second,
exports it to solid.onnx, and prints what both recommend to a user. All models side by side, over
seeds: `python -m accel.examples.recommender.experiment`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..compiler.export import export
from ..compiler.models.solid import Recommender
from ..compiler.report import report_of
from .recommender.data import load
from .recommender.experiment import Task, models
from .recommender.semantics import by_genre
from .recommender.train import Recipe, trained

__all__ = ["main"]

TASK = Task("SASRec", "DUET", "genres", seed=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("solid.onnx"))
    parser.add_argument("--epochs", type=int, default=Recipe.epochs)
    parser.add_argument("--user", type=int, default=0)
    arguments = parser.parse_args()
    Recipe.epochs = arguments.epochs
    films = load()
    model: nn.Module | None = None
    for form, each in models(TASK, films, by_genre(films)):
        if form == "metacode":
            continue
        print(form)
        model, found, _ = trained(each, films, TASK.seed)
        print(f"test items: NDCG@10 {found.ndcg[1]:.4f}, UAUC {found.uauc:.4f}")
    assert model is not None
    recommender: Any = Recommender(model.eval(), items=films.items, top=5)
    histories = films.held_out(1)[0][arguments.user][None]
    options: Any = {"codebook": True}
    with torch.no_grad():
        compiled = torch.compile(recommender, backend="accel", fullgraph=True, options=options)
        _, chosen = compiled(histories)
        print(report_of(compiled))
        engine = export(recommender, (histories,), path=arguments.output, options=options)
        _, same = engine(histories)
    print("watched:", "; ".join(films.titles[item] for item in histories[0, -5:]))
    print("recommended:", "; ".join(films.titles[item] for item in chosen[0]))
    print(f"{arguments.output}:", "; ".join(films.titles[item] for item in same[0]))


if __name__ == "__main__":
    main()
