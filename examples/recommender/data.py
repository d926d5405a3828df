"""MovieLens-100k, read from the package recbole, which is not imported. Nothing is downloaded.

    pip install --no-deps recbole

The data is GroupLens' (F. M. Harper and J. A. Konstan, "The MovieLens Datasets", 2015), under terms
of its own: for research, not to be passed on without asking. It is therefore not in this
repository.
"""

from __future__ import annotations

import csv
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...kernels.errors import MissingDependencyError

__all__ = ["MovieLens", "left_padded", "load"]

LENGTH = 30  # of a history


@dataclass(frozen=True)
class MovieLens:
    """users: what each watched, item ids from 1 on, in the order of time, int64 [N] each. titles,
    genres: of each item; those of id 0, which is padding, are empty."""

    users: tuple[Tensor, ...]
    titles: tuple[str, ...]
    genres: tuple[tuple[str, ...], ...]

    @property
    def items(self) -> int:
        """How many ids there are, padding among them."""
        return len(self.titles)

    def held_out(self, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """Leave one out: each user's last item (`last` 1) or the one before (2), given all before.

        Returns histories, int64 [users, LENGTH]; the items held out, int64 [users]; and which items
        a ranking leaves out, as the user has seen them, bool [users, items].
        """
        before = [each[:-last] for each in self.users]
        seen = torch.zeros(len(before), self.items, dtype=torch.bool)
        seen[:, 0] = True
        for user, each in enumerate(before):
            seen[user, each] = True
        return left_padded(before), torch.stack([each[-last] for each in self.users]), seen

    def examples(self) -> tuple[Tensor, Tensor]:
        """For training: user and place of every item but a user's first, and the two held out."""
        user = [torch.full((len(each) - 3,), n) for n, each in enumerate(self.users)]
        place = [torch.arange(1, len(each) - 2) for each in self.users]
        return torch.cat(user), torch.cat(place)

    def histories(self, user: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """What users had watched before places [B], int64 [B, LENGTH], and what they watched there,
        int64 [B]."""
        pairs = list(zip(user.tolist(), place.tolist(), strict=True))
        before = left_padded([self.users[n][:end] for n, end in pairs])
        return before, torch.stack([self.users[n][end] for n, end in pairs])


def left_padded(histories: list[Tensor]) -> Tensor:
    """The last LENGTH of each, int64 [B, LENGTH], with zeros before them."""
    rows = torch.zeros(len(histories), LENGTH, dtype=torch.long)
    for row, each in zip(rows, histories, strict=True):
        kept = each[-LENGTH:]
        row[LENGTH - len(kept) :] = kept
    return rows


def load() -> MovieLens:
    """100,000 ratings of 943 users and 1,682 films; the rating itself is not used.

    Ratings of the same second, which are many, stay in the order of the file. Raises
    MissingDependencyError with the install line where the package is missing.
    """
    spec = importlib.util.find_spec("recbole")
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            "MovieLens-100k is in a package: pip install --no-deps recbole"
        )
    folder = Path(spec.origin).parent / "dataset_example" / "ml-100k"
    films = _rows(folder / "ml-100k.item")
    number = {film["item_id:token"]: index for index, film in enumerate(films, 1)}
    ratings = _rows(folder / "ml-100k.inter")
    ratings.sort(key=lambda each: float(each["timestamp:float"]))
    users: dict[str, list[int]] = {}
    for each in ratings:
        users.setdefault(each["user_id:token"], []).append(number[each["item_id:token"]])
    return MovieLens(
        users=tuple(torch.tensor(users[name]) for name in sorted(users, key=int)),
        titles=("", *(film["movie_title:token_seq"] for film in films)),
        genres=((), *(tuple(film["class:token_seq"].split()) for film in films)),
    )


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
