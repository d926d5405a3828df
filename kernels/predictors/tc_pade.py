"""TC-Padé (arXiv 2603.02943, CVPR 2026), as printed and as released.

Both are here to be compared with. Neither reproduces a constant: the printed form has a pole
where the residual meets -lambda/sigma and depends on its unit, the released one answers a
constant with 1.1 times that constant. The formulas are the paper's and the release's as third
parties report them; the code is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import inner, safe_divide, trusted_or

__all__ = ["TCPadePaper", "TCPadeRelease"]

EARLY, LATE = 0.7, 0.2  # bounds of the stage rule, as fractions of the run still to go


def _staged(coefficients: Tensor | None, early: Tensor, middle: Tensor, late: Tensor) -> Tensor:
    assert coefficients is not None
    remaining = coefficients.reshape(())
    return torch.where(remaining > EARLY, early, torch.where(remaining < LATE, late, middle))


@dataclass(frozen=True)
class TCPadePaper:
    """Sections 2.3 and 2.5 of the paper.

        R = (2 sigma A - sigma B) / (1 + sigma C / lambda),
        sigma = exp(-lambda |newest - middle| / |newest + middle|)

    newest_last: the printed index order (A oldest, B middle, C newest); False is the order that
        extrapolates forwards (A newest, B middle, C oldest). The paper gives no values for the
        stage rule's weights; these are the release's.
    """

    newest_last: bool = True
    sharpness: float = 10.0  # lambda
    early_weight: float = 0.9  # alpha1; alpha2 = 1 - alpha1
    late_slope: float = 0.3  # beta
    history: int = 3
    granularity: str = "sample"
    keeps_predictions: bool = False
    reads_inputs: bool = False

    def coefficients(self, times: Tensor, remaining: Tensor, moments: Tensor) -> Tensor | None:
        return remaining.reshape(1, 1)

    def predict(
        self, residuals: Sequence[Tensor], coefficients: Tensor | None, inputs: Sequence[Tensor]
    ) -> Tensor:
        newest, middle, oldest = (residual.float() for residual in residuals)
        dims = list(range(1, newest.dim()))
        change, total = newest - middle, newest + middle
        distance = safe_divide(inner(change, change, dims), inner(total, total, dims)).sqrt()
        sigma = torch.exp(-self.sharpness * distance)
        first, below = (oldest, newest) if self.newest_last else (newest, oldest)
        rational = sigma * (2 * first - middle) / (1 + sigma / self.sharpness * below)
        early = self.early_weight * newest + (1 - self.early_weight) * middle
        late = rational + self.late_slope * change
        return trusted_or(newest, _staged(coefficients, early, rational, late))


@dataclass(frozen=True)
class TCPadeRelease:
    """The released FLUX code: elementwise, clamped, fed its own predictions, plus an input term.

    Its stage bounds (steps 6 and 16 of a hard-coded 20) are taken as fractions of the run. Its
    short-history rule (residuals times 0.8 until four are known) is left out: the schedule it
    ships never reaches it, and on any other it only hurts.
    """

    history: int = 2
    granularity: str = "sample"
    keeps_predictions: bool = True
    reads_inputs: bool = True

    def coefficients(self, times: Tensor, remaining: Tensor, moments: Tensor) -> Tensor | None:
        return remaining.reshape(1, 1)

    def predict(
        self, residuals: Sequence[Tensor], coefficients: Tensor | None, inputs: Sequence[Tensor]
    ) -> Tensor:
        newest, middle = (residual.float() for residual in residuals)
        now, before = (value.float() for value in inputs)
        change = newest - middle
        size = (newest.abs() + middle.abs()) / 2
        sigma = torch.exp(-5 * change.abs() / (size + 1e-7))
        raw = sigma * (2 * newest - middle) / (1 - 0.1 * sigma)
        average = 0.6 * newest + 0.4 * middle
        bound = torch.maximum(change.abs() / 2, 0.1 * size)
        clamped = average + torch.minimum(torch.maximum(raw - average, -bound), bound)
        weight = 0.7 * sigma + 0.3
        rational = weight * clamped + (1 - weight) * average
        early = 0.9 * newest + 0.1 * middle
        staged = _staged(coefficients, early, rational, rational + 0.3 * change)
        return trusted_or(newest, staged + 0.2 * (now - before))
