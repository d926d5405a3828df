"""What reads a history: by what its items mean, by the items themselves, or both."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ....kernels.errors import OptionError
from .behaviour import BehaviourEncoder, History
from .codebook import Codebook

__all__ = ["Encoded", "Hypernetwork"]


class Encoded(NamedTuple):
    """Vectors [B, width] that weights are generated from: the trunk, and the remainder, if there is
    one. code_loss: how far embeddings are from the codes, a number."""

    trunk: Tensor
    remainder: Tensor | None
    code_loss: Tensor


class _Semantics(nn.Module):
    """labels: int64 [items]; those below 0, and unknown items, share a label: the last."""

    labels: Tensor

    def __init__(self, labels: Tensor, width: int) -> None:
        super().__init__()
        known = int(labels.max()) + 1
        labels = torch.cat([labels, labels.new_tensor([-1])])
        self.register_buffer("labels", torch.where(labels < 0, known, labels))
        self.table = nn.Embedding(known + 1, width)
        self.encoder = BehaviourEncoder(width)

    def embedded(self, ids: Tensor) -> Tensor:
        """What items [B, L] mean, [B, L, width]."""
        embedded: Tensor = self.table(self.labels[ids])
        return embedded


class _Items(nn.Module):
    """codebook: what replaces the items' embeddings, if anything does."""

    def __init__(self, items: int, width: int, codebook: Codebook | None) -> None:
        super().__init__()
        self.table = nn.Embedding(items + 1, width)
        self.encoder = BehaviourEncoder(width)
        self.codebook = codebook
        with torch.no_grad():
            self.table.weight[-1] = 0  # unknown items

    @torch.no_grad()
    def start_at(self, labels: Tensor, codes: Tensor) -> None:
        """Put each item near the code of its label, where there is one."""
        coded = (labels < len(codes))[:, None]
        start = codes[labels.clamp(max=len(codes) - 1)] + 0.1 * codes.std() * self.table.weight
        self.table.weight.copy_(torch.where(coded, start, self.table.weight))


class Hypernetwork(nn.Module):
    """From histories to what weights are generated from.

    Without semantics the trunk is by item (DUET, APG); with them it is by semantics, and the
    remainder by item, if there is one (SOLID).
    """

    def __init__(
        self, items: int, padding: int, width: int, semantics: Tensor | None, by_item: bool,
        codebook: Codebook | None, commitment: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.count = items
        self.padding = padding
        self.commitment = commitment
        self.semantics = None if semantics is None else _Semantics(semantics, width)
        self.items = _Items(items, width, codebook) if by_item else None
        if codebook is not None:
            assert self.semantics is not None
            assert self.items is not None
            self.items.start_at(self.semantics.labels, codebook.codes)

    @property
    def codes(self) -> Tensor:
        """The semantics' embeddings, [semantics, width]."""
        if self.semantics is None:
            raise OptionError("a model without semantics has no codes")
        return self.semantics.table.weight[:-1].detach().clone()

    def forward(self, history: Tensor) -> Encoded:
        """history: int64 [B, L], with `padding` where there is no item."""
        read = History(history, self.padding)
        unknown = (read.ids < 0) | (read.ids >= self.count)
        ids = read.ids.masked_fill(unknown, self.count)
        nothing = torch.zeros((), device=history.device)
        if self.semantics is None:
            assert self.items is not None
            return Encoded(self.items.encoder(self.items.table(ids), read.count), None, nothing)
        labelled = self.semantics.embedded(ids)
        trunk = self.semantics.encoder(labelled, read.count)
        if self.items is None:
            return Encoded(trunk, None, nothing)
        embedded, loss = self.items.table(ids), nothing
        if self.items.codebook is not None:
            decoded, codes = self.items.codebook(embedded)
            loss = self._code_loss(labelled, embedded, codes.detach(), read.valid)
            embedded = decoded
        return Encoded(trunk, self.items.encoder(embedded, read.count), loss)

    def _code_loss(
        self, labelled: Tensor, embedded: Tensor, codes: Tensor, valid: Tensor
    ) -> Tensor:
        apart = (labelled - codes).square() + self.commitment * (embedded - codes).square()
        return (apart.mean(-1) * valid).sum() / valid.sum().clamp(min=1)
