"""Three recommenders, static: how each scores candidates for a user's history.

All are called with `history`, int64 [B, L], padded with 0 on the left, and `candidates`, int64
[B, C], and give scores, [B, C]. After SASRec (arXiv 1808.09781), GRU4Rec (arXiv 1511.06939) and DIN
(arXiv 1706.06978), small, and with the two-layer head that SOLID's released code makes dynamic.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ...compiler.models.solid.behaviour import BehaviourEncoder, History

__all__ = ["BACKBONES", "DIN", "DYNAMIC", "GRU4Rec", "SASRec"]


class _Block(nn.Module):
    """A transformer block in which nothing sees the future or padding."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, states: Tensor, visible: Tensor) -> Tensor:
        """states: [B, L, width]. visible: bool [B, 1, L, L]."""
        mixed = self.query_key_value(self.norm_attention(states))
        split = mixed.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(split[0], split[1], split[2], visible)
        states = states + self.out(seen.transpose(1, 2).flatten(2))
        result: Tensor = states + self.mlp(self.norm_mlp(states))
        return result


class _TwoTowers(nn.Module):
    """Scores are products of a vector of the user's and one of each candidate."""

    def __init__(self, items: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(items, width)
        nn.init.normal_(self.table.weight, std=width**-0.5)
        self.user = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        self.item = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))

    def state(self, history: Tensor) -> Tensor:
        """What the history comes to, [B, width]."""
        raise NotImplementedError

    def forward(self, history: Tensor, candidates: Tensor) -> Tensor:
        """See the module."""
        user, item = self.user(self.state(history)), self.item(self.table(candidates))
        return (item @ user[..., None])[..., 0]


class SASRec(_TwoTowers):
    """The state is that of a causal transformer at the last item."""

    def __init__(self, items: int, width: int = 32, heads: int = 2, length: int = 50) -> None:
        super().__init__(items, width)
        self.positions = nn.Parameter(torch.randn(length, width) * width**-0.5)
        self.block = _Block(width, heads)
        self.norm = nn.LayerNorm(width)

    def state(self, history: Tensor) -> Tensor:
        """Padding is on the left, so that the last place is the last item. Of a history longer than
        the table of positions the last items are read."""
        history = history[:, -self.positions.shape[0] :]
        length = history.shape[1]
        place = torch.arange(length, device=history.device)
        causal = place <= place[:, None]
        # Padding sees itself, or it would see nothing, which is not a number.
        itself = place == place[:, None]
        visible = (causal & (history != 0)[:, None]) | itself
        states = self.table(history) + self.positions[-length:]
        result: Tensor = self.norm(self.block(states, visible[:, None])[:, -1])
        return result


class GRU4Rec(_TwoTowers):
    """The state is that of a GRU at the last item."""

    def __init__(self, items: int, width: int = 32) -> None:
        super().__init__(items, width)
        self.encoder = BehaviourEncoder(width)

    def state(self, history: Tensor) -> Tensor:
        """Without what is padding."""
        read = History(history, 0)
        result: Tensor = self.encoder(self.table(read.ids), read.count)
        return result


class DIN(nn.Module):
    """What a candidate finds in the history, weighed by a small network, and a network on both.

    The small network has DIN's inputs, item and candidate and their product, but sums what it makes
    of each: so it stays affordable for a whole catalogue.
    """

    def __init__(self, items: int, width: int = 32, hidden: int = 8) -> None:
        super().__init__()
        self.table = nn.Embedding(items, width)
        nn.init.normal_(self.table.weight, std=width**-0.5)
        self.of_past, self.of_candidate = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.of_product = nn.Parameter(torch.randn(hidden))
        self.weigh = nn.Sequential(nn.ReLU(), nn.Linear(hidden, 1))
        self.user = nn.Sequential(
            nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.score = nn.Linear(width, 1)

    def forward(self, history: Tensor, candidates: Tensor) -> Tensor:
        """See the module."""
        item, past = self.table(candidates), self.table(history)
        product = (item @ past.transpose(1, 2))[..., None]
        mixed = self.of_candidate(item)[:, :, None] + self.of_past(past)[:, None]
        weights = self.weigh(mixed + product * self.of_product)[..., 0]
        found = (weights * (history != 0)[:, None]) @ past
        result: Tensor = self.score(self.user(torch.cat([found, item], -1)))[..., 0]
        return result


BACKBONES: dict[str, Callable[[int], nn.Module]] = {
    "SASRec": SASRec,
    "GRU4Rec": GRU4Rec,
    "DIN": DIN,
}
DYNAMIC = ("user.0", "user.2")  # the layers that become dynamic, in all three
