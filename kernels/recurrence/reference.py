"""The recurrence of a GRU, plainly: the oracle, and what leaves in exported files."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

__all__ = ["recurrence"]


def recurrence(gates: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `op.recurrence`."""
    states = []
    for step in gates.unbind(1):
        reset, update, new = step.chunk(3, -1)
        own_reset, own_update, own_new = linear(state, weight, bias).chunk(3, -1)
        reset, update = torch.sigmoid(reset + own_reset), torch.sigmoid(update + own_update)
        new = torch.tanh(new + reset * own_new)
        state = new + update * (state - new)
        states.append(state)
    return torch.stack(states, 1)
