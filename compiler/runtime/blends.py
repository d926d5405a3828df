"""Samples in which a sampler keeps what is known: inpainting puts a picture's pixels back after
every step, with the noise of that step. There the next sample is made of earlier samples alone, and
by other factors than elsewhere: two of them hold the picture and the noise. The idea is ours."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["put_back"]

DRAWS = 64  # windows that factors are tried from
WINDOW = 3  # positions in a window for each of the factors
NEAR = 40.0  # expected rounding errors, within which a position is explained; others: 1e4


def put_back(target: Tensor, samples: Tensor, error: float) -> Tensor | None:
    """The positions of a sample that two earlier ones alone explain; None if hardly any is.

    target: [P]; samples: [P, A], those of A steps before, newest first, float64. error: the
    relative rounding error of both. Positions are in the order in which they lie in the sample, so
    that a few that follow each other are mostly either all put back or none (a sample consensus:
    Fischler and Bolles 1981, with windows in place of draws at random).
    """
    samples = samples[:, :2]  # more would make the factors ambiguous
    count, factors = samples.shape
    width = WINDOW * factors
    if factors < 2 or count < 2 * width:
        return None
    starts = torch.linspace(0, count - width, DRAWS, dtype=torch.float64).long()
    windows = starts[:, None] + torch.arange(width)
    chosen = _factors(samples[windows], target[windows])
    explained = _explained(target, samples, chosen, error)
    best = explained[explained.sum(1).argmax()]
    for _ in range(2):  # by all that are explained, others may be, too
        if best.sum() <= width:
            return None
        again = _factors(samples[best][None], target[best][None])
        best = _explained(target, samples, again, error)[0]
    return best


def _factors(columns: Tensor, target: Tensor) -> Tensor:
    """[N, A] of [N, W, A] and [N, W], by least squares relative to the target's size."""
    weight = 1 / (target.abs() + 0.05 * target.square().mean(1, keepdim=True).sqrt() + 1e-300)
    weighted = columns * weight[..., None]
    gram = weighted.mT @ weighted
    size = gram.diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=1e-300)
    gram = gram + 1e-13 * size[:, None, None] * torch.eye(columns.shape[-1], dtype=gram.dtype)
    found: Tensor = torch.linalg.solve_ex(gram, weighted.mT @ (target * weight)[..., None])[0]
    return found[..., 0]


def _explained(target: Tensor, samples: Tensor, factors: Tensor, error: float) -> Tensor:
    """bool [N, P]: whether factors [N, A] explain a position, as far as rounding lets see."""
    parts = samples[None] * factors[:, None, :]
    expected = error * (target.square() + parts.square().sum(-1)).sqrt()
    near: Tensor = (target - parts.sum(-1)).abs() <= NEAR * expected
    return near
