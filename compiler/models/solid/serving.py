"""From histories to the best items of a whole catalogue, as one module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ....kernels.errors import OptionError

__all__ = ["Recommender"]


class Recommender(nn.Module):
    """The `top` items of a catalogue for each history, by a model that scores candidates.

    model: called with `history` and `candidates`, int64 [B, C], by these names or those given; it
    returns scores [B, C]. items: how many ids there are; `padding` is never recommended, and what
    is in the history only with `again`. Made to be compiled, with options={"codebook": True}, or
    exported: all of it is one graph.
    """

    def __init__(
        self, model: nn.Module, *, items: int, top: int = 10, padding: int = 0,
        again: bool = False, history: str = "history", candidates: str = "candidates",
    ) -> None:  # fmt: skip
        super().__init__()
        if not 0 < top < items:
            raise OptionError(f"top is {top}; needed is at least 1, and fewer than {items} items")
        if not 0 <= padding < items:
            raise OptionError(
                f"padding is {padding}; needed is one of the {items} ids, the model's own"
            )
        self.model = model
        self.items = items
        self.top = top
        self.padding = padding
        self.again = again
        self.names = history, candidates

    def forward(self, history: Tensor) -> tuple[Tensor, Tensor]:
        """history: int64 [B, L]; an id that is none of the catalogue's has to be one that the model
        knows for such. Returns scores, [B, top], the best first, and their items, int64; where
        fewer than `top` are left to a user, the last have scores of -inf and mean nothing."""
        catalogue = torch.arange(self.items, device=history.device)
        given: dict[str, Any] = dict(
            zip(self.names, (history, catalogue.expand(len(history), -1)), strict=True)
        )
        scores = self.model(**given)
        left_out = (catalogue == self.padding).expand(len(history), -1)
        if not self.again:
            unknown = (history < 0) | (history >= self.items)
            left_out = left_out.scatter(1, history.masked_fill(unknown, self.padding), True)
        found = scores.masked_fill(left_out, -torch.inf).topk(self.top)
        return found.values, found.indices
