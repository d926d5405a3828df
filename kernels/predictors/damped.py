"""A line whose slope is damped by what the last computed step showed (ours)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OptionError
from .base import AlongDifferences, distinct, safe_divide, usable

__all__ = ["Damped"]


@dataclass(frozen=True)
class Damped(AlongDifferences):
    """The line through the last two residuals, with a slope of its own for each sample.

    Damped trends are an old means against lines that run too far (Gardner & McKenzie 1985). Here
    the newest residual says by which slope the line before it would have met it best,

        f = <d1, d2> / (g |d2|^2),   d1, d2 the last two differences, g the ratio of their gaps

    and the forecast is R + (usual + f) / 2 times d1 in real time, with f from 0 to `most`. Where d1
    turns back on d2 that says nothing of the steps to come, and the slope is `usual`. With fewer
    than three residuals there is no f, and the newest is reused: on trained models the first one
    was an outlier as often as not.

    Exact on constants; scale-equivariant.

    usual: the slope where nothing was observed. most: the largest observed one that counts.
    """

    usual: float = 0.75
    most: float = 1.2
    granularity: str = "sample"
    keeps_predictions: bool = False
    reads_inputs: bool = False
    history: int = 3

    def __post_init__(self) -> None:
        if not (0 <= self.usual <= self.most):
            raise OptionError(
                f"usual is {self.usual} and most {self.most}; they have to be 0 <= usual <= most"
            )

    def coefficients(self, times: Tensor, remaining: Tensor, moments: Tensor) -> Tensor | None:
        _, before, together = moments[:3]
        known = distinct(times[1:])[2]
        times = times.reshape([*times.shape, *[1] * (before.dim() - 1)])
        gap = times[2] - times[1]
        ahead = safe_divide(times[1] - times[0], gap)  # in newest gaps
        ratio = safe_divide(gap, times[3] - times[2])
        observed = safe_divide(together, ratio * before).clamp(0, self.most)
        observed = torch.where(together > 0, observed, self.usual)
        slope = (observed + self.usual) / 2
        slope = torch.where(known.reshape(gap.shape), slope * ahead, 0.0)
        return usable(torch.stack([slope, torch.zeros_like(slope)]))
