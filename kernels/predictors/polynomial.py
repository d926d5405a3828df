"""Polynomial forecasts: plain reuse and extrapolation in real time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import AlongDifferences, differences_of, distinct, safe_divide

__all__ = ["Reuse", "Taylor"]


@dataclass(frozen=True)
class Reuse:
    """The newest residual, unchanged."""

    history: int = 1
    granularity: str = "sample"
    keeps_predictions: bool = False
    reads_inputs: bool = False

    def coefficients(self, times: Tensor, remaining: Tensor, moments: Tensor) -> Tensor | None:
        return None

    def predict(
        self, residuals: Sequence[Tensor], coefficients: Tensor | None, inputs: Sequence[Tensor]
    ) -> Tensor:
        # A new tensor: the branch of a graph may not return its operand itself.
        return residuals[0].float() * 1.0


@dataclass(frozen=True)
class Taylor(AlongDifferences):
    """The polynomial of degree `order` through the newest `order + 1` residuals.

    Lagrange's weights at the real times, so it is exact on polynomials of that degree whatever the
    spacing. TaylorSeer (arXiv 2503.06923) divides every order by one step count and is exact only
    on even spacing and up to degree 1; the idea is theirs, this form is Lagrange's.
    With less history the degree falls, down to reuse.
    """

    order: int = 1
    granularity: str = "sample"
    keeps_predictions: bool = False
    reads_inputs: bool = False

    @property
    def history(self) -> int:
        return self.order + 1

    def coefficients(self, times: Tensor, remaining: Tensor, moments: Tensor) -> Tensor | None:
        now, nodes = times[0], times[1:]
        known = distinct(nodes)
        weights = []
        for own, node in enumerate(nodes):
            weight = torch.where(known[own], 1.0, torch.zeros_like(now))
            for other, place in enumerate(nodes):
                if other != own:
                    factor = safe_divide(now - place, node - place)
                    weight = weight * torch.where(known[other], factor, 1.0)
            weights.append(weight)
        return differences_of(torch.stack(weights))
