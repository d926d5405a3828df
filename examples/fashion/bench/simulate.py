"""The Padé branch in plain Python: quick to re-schedule, and a second opinion on the pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ....kernels.predictors import Predictor, moments

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
        self.computed, self.steps, self.step = frozenset(computed), steps, -1
        self.residuals: list[Tensor] = []
        self.times: list[Tensor] = []
        self.moments = torch.zeros(5, 1)
        self.previous: Tensor | None = None

    def forward(self, hidden_states: Tensor, *, timestep: Tensor, **kwargs: Any) -> Tensor:
        self.step += 1
        now = timestep.double()
        if self.step in self.computed:
            output = hidden_states
            for block in self.blocks:
                output = block(output, timestep=timestep, **kwargs)
            residual = output - hidden_states
            self.moments = moments(
                residual,
                self.residuals or [residual],
                residual,
                self.predictor.granularity,
            ).double()
        else:
            residual = self._predicted(now, hidden_states)
            output = hidden_states + residual
        if self.step in self.computed or self.predictor.keeps_predictions:
            kept = self.predictor.history
            self.residuals = [residual, *self.residuals][:kept]
            self.times = [now, *self.times][:kept]
        self.previous = hidden_states
        return output

    def _predicted(self, now: Tensor, hidden_states: Tensor) -> Tensor:
        missing = self.predictor.history - len(self.residuals)
        residuals = [*self.residuals, *[self.residuals[-1]] * missing]
        times = torch.stack([now, *self.times, *[self.times[-1]] * missing])
        remaining = torch.tensor(1 - self.step / self.steps, dtype=times.dtype)
        coefficients = self.predictor.coefficients(times, remaining, self.moments)
        known = None if coefficients is None else coefficients.float()
        inputs: list[Tensor] = []
        if self.predictor.reads_inputs:
            assert self.previous is not None
            inputs = [hidden_states, self.previous]
        return self.predictor.predict(residuals, known, inputs)
