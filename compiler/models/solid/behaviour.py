"""From what a user did to one vector: the part of a hypernetwork that reads a history."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["BehaviourEncoder", "History"]


class History:
    """Histories without their padding, wherever that was.

    ids: int64 [B, L], a user's items in their order, then anything. count: int64 [B], how many.
    """

    def __init__(self, history: Tensor, padding: int) -> None:
        valid = history != padding
        self.count = valid.sum(1)
        # Where each is to go: items to the front, the rest behind them.
        front = valid.cumsum(1) - 1
        behind = self.count[:, None] + (~valid).cumsum(1) - 1
        self.ids = torch.zeros_like(history).scatter(1, torch.where(valid, front, behind), history)

    @property
    def valid(self) -> Tensor:
        """Which of `ids` are items, bool [B, L]."""
        place = torch.arange(self.ids.shape[1], device=self.ids.device)
        return place < self.count[:, None]


class BehaviourEncoder(nn.Module):
    """A GRU over the embeddings of a history, and a perceptron on its last state.

    After DUET's hypernetwork, as in SOLID's released code. Written with `torch.gru`, as
    `torch.compile` refuses the module `nn.GRU`.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        # Input and recurrent weights and biases of the three gates, as `nn.GRU` orders them.
        shapes = (3 * width, width), (3 * width, width), (3 * width,), (3 * width,)
        bound = 1 / math.sqrt(width)
        self.gates = nn.ParameterList(
            nn.Parameter(torch.empty(shape).uniform_(-bound, bound)) for shape in shapes
        )
        self.project = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))

    def forward(self, embedded: Tensor, count: Tensor) -> Tensor:
        """embedded: [B, L, width]. count: int64 [B], how many of them count. Returns [B, width].

        The state of an empty history is zero, whatever fills its places.
        """
        begin = self.gates[0].new_zeros(1, embedded.shape[0], self.width)
        states, _ = torch.gru(
            embedded, begin, list(self.gates), True, 1, 0.0, self.training, False, True
        )
        place = (count - 1).clamp(min=0)[:, None, None].expand(-1, 1, self.width)
        last = states.gather(1, place)[:, 0]
        result: Tensor = self.project(torch.where(count[:, None] > 0, last, 0.0))
        return result
