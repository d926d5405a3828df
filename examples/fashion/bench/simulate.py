"""The Padé branch in plain Python: quick to re-schedule, and a second opinion on the pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ....kernels.predictors import Predictor, moments
from ....passes.pade import rules
from ....passes.pade.rules import Carried, CarriedStream
from ....passes.pade.state import StreamOutputs

__all__ = ["SkippingStack"]


class SkippingStack(nn.Module):
    """Stands for all blocks of a DiT: computes them on the listed steps, predicts on the others.

    Call `begin` before every sampling run.
    """

    def __init__(self, blocks: nn.ModuleList, predictor: Predictor) -> None:
        super().__init__()
        self.blocks = blocks
        self.norm1 = blocks[0].norm1  # DiT's last layer borrows its timestep embedding
        self.predictor = predictor
        self.begin((), 1)

    def begin(self, computed: Sequence[int], steps: int) -> None:
        """Forget the last run; `computed` are the next one's steps to compute, of `steps`."""
        self.computed, self.steps = frozenset(computed), steps
        self.carried: Carried | None = None

    def forward(self, hidden_states: Tensor, *, timestep: Tensor, **kwargs: Any) -> Tensor:
        predictor, now = self.predictor, timestep.double()
        blank = torch.zeros_like(hidden_states)
        carried = self.carried
        if carried is None:
            stream = CarriedStream(torch.zeros(5, 1), (blank,) * predictor.history, blank)
            carried = rules.begin(predictor.history, now, [stream])
        step = int(carried.step)
        compute = bool(rules.decide(carried, step in self.computed))
        remaining = torch.tensor(1 - step / self.steps, dtype=now.dtype)
        (given,) = rules.arguments([predictor], carried, now, remaining)
        inputs = [hidden_states, given.previous] if predictor.reads_inputs else []
        residual = predictor.predict(given.residuals, given.coefficients, inputs)
        measured = torch.zeros(5, 1)
        if compute:
            output = hidden_states
            for block in self.blocks:
                output = block(output, timestep=timestep, **kwargs)
            guess, residual = residual, output - hidden_states
            measured = moments(residual, given.residuals[:2], guess, predictor.granularity).double()
        else:
            output = hidden_states + residual
        made = [StreamOutputs(measured, residual, hidden_states)]
        self.carried = rules.record(carried, predictor, compute, True, now, made)
        return output
