"""Where a sample comes from: whether it is made of what an earlier step of a run has seen.

Every deterministic sampler makes the next sample as a linear combination of its run's earlier
samples and of the model's outputs at them, those of both branches of guidance. So a least-squares
fit at some positions of the sample proves that a call continues a step: its own run's leave only
rounding, another's leave far more. The idea and its measurement are ours:
`python -m accel.examples.runs.recognition` makes the figures by scheduler, guidance and type.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "FINE",
    "MOST",
    "WEIGHED",
    "Fit",
    "Limits",
    "few",
    "fit",
    "flattened",
    "limits_of",
    "positions",
    "rounding",
]

MOST = 2048  # positions of a sample that are fitted
WEIGHED = 64  # positions that show what a sampler makes of outputs
ROUNDED = 0.21  # root mean square of a rounding error, in the type's machine epsilons
FINE = 1e-6  # the relative rounding error below which a type counts as fine
RIDGE = 1e-13  # of the Gram matrix's diagonal: columns may be equal, or empty


@dataclass(frozen=True)
class Limits:
    """What counts as a proof.

    unexplained: the most that may be left, root mean square, in expected rounding errors.
    needed: how many times as much has to be left without the outputs of the newest step: what
        explains a sample without them is a line through noise, not a sampler.
    sure: where no more is left, no other step is tried.
    alone: where more is left, no other step may explain the sample nearly as well.
    reach: steps back that a sampler's formula is taken to use, its own included. LMS and PNDM use
        four; in coarse types the fourth is below the rounding, and only adds to what fits.
    """

    unexplained: float
    needed: float
    sure: float
    alone: float
    reach: int


def rounding(dtype: torch.dtype) -> float:
    """The relative error, root mean square, of a number that was rounded to a type."""
    return ROUNDED * torch.finfo(dtype).eps


def limits_of(dtype: torch.dtype) -> Limits:
    """Limits by the coarsest type that a sampler rounds to.

    In float32 a sampler's own arithmetic leaves up to 36 roundings (flow Heun; else up to 8), and
    where it divides by small noise up to 120 (LMS, PNDM); other runs and forks leave mostly 850 and
    more: only EDM's first and last steps hardly differ. In bfloat16
    and float16 a run's own leave 0.8 to 1.7, and others 8 and more, but for forks that differ by
    hardly more than the rounding. So what leaves more than `sure` is compared with all else, and
    the best taken. In coarse types a smooth run's newest output adds less than the rounding, too;
    but whatever the rounding is, an output that a sample was not made of takes off one part in a
    thousand of what is left, not a tenth; and where another step explains a sample nearly as well,
    neither is proven (`origins.RIVAL`).
    """
    if torch.finfo(dtype).eps > 1e-5:
        return Limits(unexplained=2.0, needed=1.1, sure=0.9, alone=0.0, reach=3)
    return Limits(unexplained=200.0, needed=10.0, sure=3.0, alone=60.0, reach=4)


@dataclass(frozen=True)
class Fit:
    """Of each target: what is left, in expected rounding errors, with all of its basis and without
    the newest outputs; factors: what the columns of the basis are multiplied by, [S, K]."""

    left: Tensor
    left_without: Tensor
    factors: Tensor

    def proves(self, limits: Limits) -> Tensor:
        """bool, one for each target."""
        # Of a fit that happens to be exact, an error of half a rounding is no more than that.
        enough = self.left_without >= limits.needed * self.left.clamp(min=0.5)
        return (self.left <= limits.unexplained) & enough


def fit(target: Tensor, basis: Tensor, newest: Tensor, error: float, unused: Tensor) -> Fit:
    """Explain targets by bases.

    target: [S, P], S samples at P positions. basis: [S, P, K]; columns of zeros are none. newest:
    bool [S, K], the outputs of the newest step. error: the relative rounding error of all of them.
    unused: bool [S, P], positions to leave out. The numbers are float64 on the CPU.
    """
    size = basis.square().mean(1, keepdim=True).sqrt()  # [S, 1, K]
    size = torch.where(size > 0, size, 1.0)
    columns = basis / size
    own = target.abs()
    typical = target.square().mean(1, keepdim=True).sqrt() + 1e-300
    used = (~unused).double()
    # First as if rounding were all that the target's elements differ in, and some for the rest.
    weight = used / (own + 0.05 * typical)
    factors = _solved(columns, target, weight)
    # What a fine type leaves of another run is so much more that this is enough to tell.
    for again in range(1 if error < FINE else 3):
        if again:
            factors = _solved(columns, target, weight)
        spread = (columns * factors[:, None, :]).square().sum(-1)
        expected = error * ((own.square() + spread).sqrt() + 1e-3 * typical)
        weight = used / expected
    older = torch.where(newest[:, None, :], 0.0, columns)
    without = _solved(older, target, weight)
    return Fit(
        _left(columns, factors, target, weight),
        _left(older, without, target, weight),
        factors / size[:, 0],
    )


def _solved(columns: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    weighted = columns * weight[..., None]
    gram = weighted.mT @ weighted
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    largest = diagonal.amax(-1, keepdim=True).clamp(min=1e-300)
    gram = gram + torch.diag_embed(RIDGE * largest + torch.where(diagonal > 0, 0.0, largest))
    known = weighted.mT @ (target * weight)[..., None]
    factors: Tensor = torch.linalg.solve_ex(gram, known)[0][..., 0]
    return factors


def _left(columns: Tensor, factors: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    difference = target - (columns @ factors[..., None])[..., 0]
    count = (weight > 0).sum(1).clamp(min=1)
    left = ((difference * weight).square().sum(1) / count).sqrt()
    return torch.where(left.isfinite(), left, math.inf)


def few(places: Tensor, most: int) -> Tensor:
    """Not many more than `most` of the places, from all over a sample, or of the values there."""
    return places[:: max(len(places) // most, 1)]


def positions(box: Sequence[int], wanted: int) -> list[Tensor]:
    """`wanted` places in a box, at random over all of it, the same for each such box; or all of
    them, where these are fewer. An entry for each dimension."""
    count = math.prod(box)
    generator = torch.Generator().manual_seed(count)
    # Of many, a few twice do no harm.
    few = count <= 2**20
    chosen = torch.randperm(count, generator=generator)[:wanted] if few else (
        torch.randint(count, (wanted,), generator=generator)
    )  # fmt: skip
    return list(torch.unravel_index(chosen.sort().values, tuple(box)))


def flattened(places: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Places, given in each dimension, as positions in a flattened tensor."""
    flat = torch.zeros_like(places[0])
    for place, size in zip(places, shape, strict=True):
        flat = flat * size + place
    return flat
