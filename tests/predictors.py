"""A predictor of a user's own, and models that are compiled with one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Leaning:
    """Reuse, leaning towards the line through the newest two residuals."""

    gain: float = 0.5
    inside: float = 1.0  # a factor in `predict`, that of the coefficients being `gain`
    history: Any = 2
    granularity: Any = "sample"
    keeps_predictions: Any = False
    reads_inputs: Any = False

    def coefficients(self, times: Tensor, remaining: Tensor, moments: Tensor) -> Any:
        gap = times[1] - times[2]
        ahead = (times[0] - times[1]) / torch.where(gap == 0, 1.0, gap)
        return torch.where(gap == 0, 0.0, self.gain * ahead)[None]

    def predict(
        self, residuals: Sequence[Tensor], coefficients: Tensor | None, inputs: Sequence[Tensor]
    ) -> Any:
        assert coefficients is not None
        newest, older = residuals[0].float(), residuals[1].float()
        return newest + self.inside * coefficients[0][:, None, None] * (newest - older)


def compiled(model: Any, predictor: Any, lowering: str = "eager", **pade: Any) -> Any:
    options = {"lowering": lowering, "pade": {"predictor": predictor, **pade}}
    return torch.compile(model, backend="accel", fullgraph=True, options=options)
