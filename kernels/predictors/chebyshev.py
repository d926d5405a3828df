"""Ridge regression in a Chebyshev basis over all known residuals (Spectrum, arXiv 2603.01623)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OptionError
from .base import AlongDifferences, differences_of, distinct, safe_divide, usable

__all__ = ["Chebyshev"]


@dataclass(frozen=True)
class Chebyshev(AlongDifferences):
    """A Chebyshev series fitted to the whole history, averaged with its newest two's line.

    Spectrum (arXiv 2603.01623; as its released code has it, the paper's body was not at hand) fits
    T_0 to T_M of time, scaled to [-1, 1] over the run, to every residual R computed so far:

        C = (Phi' Phi + ridge I)^-1 Phi' R,    R(t) = phi(t)' C

    and averages the forecast with linear extrapolation. Since C is linear in R, the forecast is a
    weighted sum of the residuals, with weights that depend on the times alone. Ours are three
    changes: T_0 is not penalised (centred columns), without which the weights would not sum to 1
    and a constant would shrink; the run's end is estimated from the times seen and the fraction
    still to go; and only the newest `history` residuals are kept, since state is explicit.

    Exact on constants. Where one residual is known it is reuse.

    history: how many residuals are fitted, each a tensor of state. 8 are all that preset "balanced"
        computes of 20 steps; of longer runs the newest 8.
    degree: M; 4 is Spectrum's.
    ridge: the penalty. Spectrum's 0.1 shrinks a fit to so few residuals almost to their mean (2.6
        and 1.7 dB worse on the reference model at 8 and 6 full steps of 20).
    share: how much of the forecast is the series, the rest is the line. Spectrum's paper has 1, its
        authors now advise 0.5 to 1. At 1 the reference model loses 1.6 to 2.8 dB to 0.5 (6, 8 and
        10 full steps of 20, 20 of 50).
    """

    history: int = 8
    degree: int = 4
    ridge: float = 0.01
    share: float = 0.5
    granularity: str = "sample"
    keeps_predictions: bool = False
    reads_inputs: bool = False

    def __post_init__(self) -> None:
        if self.history < 2:
            raise OptionError(f"history is {self.history}; it has to be at least 2")
        if self.degree < 1:
            raise OptionError(f"degree is {self.degree}; it has to be at least 1")
        if not (math.isfinite(self.ridge) and self.ridge > 0):
            raise OptionError(f"ridge is {self.ridge}; it has to be a finite number above 0")
        if not 0 <= self.share <= 1:
            raise OptionError(f"share is {self.share}; it has to be from 0 to 1")

    def coefficients(self, times: Tensor, remaining: Tensor, moments: Tensor) -> Tensor | None:
        nodes = times[1:]
        series = differences_of(self._weights(times, distinct(nodes), remaining))
        ahead = safe_divide(times[0] - nodes[0], nodes[0] - nodes[1])
        line = torch.cat([usable(ahead[None]), torch.zeros_like(series[1:])])
        return self.share * series + (1 - self.share) * line

    def _weights(self, times: Tensor, known: Tensor, remaining: Tensor) -> Tensor:
        """The series' weight of each residual, `[history, batch]`."""
        basis = self._basis(self._place(times, known, remaining))
        there = known.to(times.dtype)
        count = there.sum(0)
        # Centred columns are what an unpenalised constant amounts to.
        basis = basis - ((basis[:, 1:] * there).sum(1) / count)[:, None]
        wanted, past = basis[:, :1], basis[:, 1:] * there
        penalty = self.ridge * torch.eye(self.degree, dtype=times.dtype, device=times.device)
        matrix = (past[:, None] * past[None]).sum(2) + penalty[:, :, None]
        solution = _solved(torch.cat([matrix, wanted], 1))
        return there / count + (past * solution[:, None]).sum(0)

    def _place(self, times: Tensor, known: Tensor, remaining: Tensor) -> Tensor:
        """Where in the run, from -1 to 1, each time is: `[history + 1, batch]`."""
        now, newest = times[0], times[1]
        inside = torch.where(known, times[1:], now)
        first, last = inside.amin(0).minimum(now), inside.amax(0).maximum(now)
        # What is to come is to what has been as the fraction to go is to the rest.
        coming = safe_divide(remaining, 1 - remaining).clamp(min=0) * (last - first)
        falling = now <= newest
        first = torch.where(falling, first - coming, first)
        last = torch.where(falling, last, last + coming)
        place = 2 * safe_divide(times - first, last - first) - 1
        # Those that are not known may lie anywhere; they have no weight.
        return place.clamp(-1, 1)

    def _basis(self, place: Tensor) -> Tensor:
        """T_1 to T_M of places: `[degree, history + 1, batch]`."""
        found = [torch.ones_like(place), place]
        while len(found) <= self.degree:
            found.append(2 * place * found[-1] - found[-2])
        return torch.stack(found[1:])


def _solved(system: Tensor) -> Tensor:
    """The solutions `[n, batch]` of positive definite systems `[n, n + 1, batch]`.

    The right-hand side is the last column. Elimination without pivots, which such a matrix does not
    need, in plain arithmetic: ONNX has no solver.
    """
    rows = list(system)
    for own in range(len(rows)):
        rows[own] = rows[own] / rows[own][own]
        for other in range(len(rows)):
            if other != own:
                rows[other] = rows[other] - rows[other][own] * rows[own]
    return torch.stack([row[-1] for row in rows])
