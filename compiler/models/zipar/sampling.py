"""Drawing tokens inside a graph, from random numbers that are inputs."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["accept", "draw", "residual"]


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the cumulative distribution passes `uniform`.

    probabilities: [..., V], which need not sum to 1. uniform: [...], in [0, 1). A token of
    probability 0 is never drawn.
    """
    # In double precision, or rounding could step past the last token that is possible.
    cumulative = probabilities.double().cumsum(-1)
    limit = uniform.double()[..., None] * cumulative[..., -1:]
    return (cumulative <= limit).sum(-1)


def accept(drawn: Tensor, before: Tensor, after: Tensor, uniform: Tensor) -> Tensor:
    """Whether tokens [...] drawn from `before` [..., V] stand, now that `after` is known.

    ZipAR (arXiv 2412.04062), section on the adaptive window: with probability
    min(1, after / before). Where it fails, draw from `residual`: the token then is from `after`.
    """
    old = before.gather(-1, drawn[..., None])[..., 0]
    new = after.gather(-1, drawn[..., None])[..., 0]
    return uniform * old < new


def residual(before: Tensor, after: Tensor) -> Tensor:
    """What to draw from where a token was refused, not normalised: max(0, after - before).

    The paper says that the distribution is adjusted, not how; this is speculative sampling's
    (Leviathan et al. 2023, arXiv 2211.17192). Where rounding leaves nothing, it is `after`.
    """
    left = (after - before).clamp(min=0)
    return torch.where(left.sum(-1, keepdim=True) > 0, left, after)
