"""Polynomial forecasts: plain reuse and Newton's extrapolation in real time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import per_sample, safe_divide, trusted_or

__all__ = ["Reuse", "Taylor"]


@dataclass(frozen=True)
class Reuse:
    """The newest residual, unchanged."""

    history: int = 1
    keeps_predictions: bool = False
    reads_inputs: bool = False

    def predict(
        self,
        residuals: Sequence[Tensor],
        times: Tensor,
        remaining: Tensor,
        inputs: Sequence[Tensor],
    ) -> Tensor:
        # A new tensor: the branch of a graph may not return its operand itself.
        return residuals[0].float() * 1.0


@dataclass(frozen=True)
class Taylor:
    """The polynomial of degree `order` through the newest `order + 1` residuals.

    Divided differences over the real times, so it is exact on polynomials of that degree whatever
    the spacing. TaylorSeer (arXiv 2503.06923) divides every order by one step count and is exact
    only on even spacing and up to degree 1; the idea is theirs, this form is Newton's.
    With less history the degree falls, down to reuse.
    """

    order: int = 1
    keeps_predictions: bool = False
    reads_inputs: bool = False

    @property
    def history(self) -> int:
        return self.order + 1

    def predict(
        self,
        residuals: Sequence[Tensor],
        times: Tensor,
        remaining: Tensor,
        inputs: Sequence[Tensor],
    ) -> Tensor:
        table = [residual.float() for residual in residuals]
        newest = table[0]
        result = newest
        basis = torch.ones_like(times[0])
        for order in range(1, self.order + 1):
            table = [
                safe_divide(left - right, per_sample(times[1 + i] - times[1 + i + order], newest))
                for i, (left, right) in enumerate(itertools.pairwise(table))
            ]
            # A repeated time marks missing history: this order and all above it drop out.
            known = times[order] != times[order + 1]
            basis = torch.where(known, basis * (times[0] - times[order]), 0.0)
            result = result + per_sample(basis, newest) * table[0]
        return trusted_or(newest, result)
