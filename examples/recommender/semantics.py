"""What films mean: a label for each, from genres, or from groups of similar ones."""

from __future__ import annotations

import torch
from torch import Tensor

from .data import MovieLens

__all__ = ["by_genre"]


def by_genre(films: MovieLens, fewest: int = 5) -> Tensor:
    """A label for each combination of genres that at least `fewest` films have, int64 [items].

    Films of a rarer one take the label of the most frequent one of their genres alone; without any,
    -1.
    """
    combined = [frozenset(each) for each in films.genres]
    count: dict[frozenset[str], int] = {}
    for each in combined:
        count[each] = count.get(each, 0) + 1
    labels: dict[frozenset[str], int] = {}
    found = []
    for each in combined:
        options = [each] if count[each] >= fewest else [frozenset([name]) for name in sorted(each)]
        chosen = max(options, key=lambda option: count.get(option, 0), default=frozenset())
        found.append(labels.setdefault(chosen, len(labels)) if chosen else -1)
    return torch.tensor(found)
