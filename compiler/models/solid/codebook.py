"""The semantic codebook: a user's items as the nearest of few codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Codebook"]


class Codebook(nn.Module):
    """Replaces the embedding of an item by what the nearest code is decoded to.

    codes: [codes, width], frozen: the semantics' embeddings, learnt before. straight_through:
    whether an item's embedding learns as if it were its code; the released code lets nothing
    through the choice of the code.
    """

    codes: Tensor

    def __init__(self, codes: Tensor, straight_through: bool) -> None:
        super().__init__()
        width = codes.shape[1]
        self.register_buffer("codes", codes.detach().clone())
        self.straight_through = straight_through
        self.decode = nn.Sequential(
            nn.Linear(width, 2 * width), nn.LeakyReLU(0.1), nn.Linear(2 * width, width)
        )

    def nearest(self, embedded: Tensor) -> Tensor:
        """Which code is nearest to embeddings [..., width], int64."""
        product = embedded @ self.codes.t()
        return (self.codes.square().sum(1) - 2 * product).argmin(-1)

    def forward(self, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """What the codes of embeddings [..., width] are decoded to, and the codes, as large."""
        codes = self.codes[self.nearest(embedded)]
        passed = codes
        if self.straight_through and torch.is_grad_enabled():
            passed = embedded + (codes - embedded).detach()
        return self.decode(passed), codes
