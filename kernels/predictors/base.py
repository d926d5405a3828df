"""What a residual predictor is, and the signals by which a computed step judges it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Predictor", "inner", "per_sample", "safe_divide", "signals", "trusted_or"]


class Predictor(Protocol):
    """Forecasts a stack's residual (output minus input) from those of earlier steps.

    Implementations are frozen dataclasses; `predict` is plain torch without control flow on
    values, so that it can be traced into the skip branch of a graph.
    """

    @property
    def history(self) -> int:
        """How many earlier residuals `predict` reads."""

    @property
    def keeps_predictions(self) -> bool:
        """Whether predicted residuals enter the history too (only TC-Padé's release does)."""

    @property
    def reads_inputs(self) -> bool:
        """Whether `predict` needs the stack's current and previous input."""

    def predict(
        self,
        residuals: Sequence[Tensor],
        times: Tensor,
        remaining: Tensor,
        inputs: Sequence[Tensor],
    ) -> Tensor:
        """The residual at time `times[0]`, float32, of the shape of each residual.

        residuals: `history` tensors `[batch, ...]`, newest first. A run younger than that
            repeats its oldest entry, time included.
        times: `[history + 1, batch]`, in the sampler's own unit; row 0 is the step to predict,
            row 1 the newest residual, and so on.
        remaining: 0-d, the fraction of the run still to go (1 at the first step).
        inputs: the stack's input now and on the step before, where `reads_inputs`; else empty.
        """


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """`[batch]` values shaped to broadcast over `like` `[batch, ...]`."""
    return values.reshape([-1] + [1] * (like.dim() - 1))


def safe_divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """`numerator / denominator`, and 0 where the denominator is 0."""
    zero = denominator == 0
    return torch.where(zero, 0.0, numerator / torch.where(zero, 1.0, denominator))


def trusted_or(fallback: Tensor, prediction: Tensor) -> Tensor:
    """The prediction, and the fallback where it overflowed or is not a number."""
    return torch.where(torch.isfinite(prediction), prediction, fallback)


def inner(left: Tensor, right: Tensor, dims: Sequence[int]) -> Tensor:
    """Inner product over `dims`, which stay as size 1."""
    return (left * right).sum(dim=list(dims), keepdim=True)


def signals(
    actual: Tensor,
    residuals: Sequence[Tensor],
    predicted: Tensor,
) -> Tensor:
    """What a computed step learns about predictability: float32 `[3]`.

    actual: the residual just computed, `[batch, ...]`; residuals: earlier ones, newest first;
    predicted: what the predictor would have said.

    [0] 1 if every value of `actual` is finite, else 0;
    [1] turn: the chord between the directions of the last two residual differences, in [0, 2],
        mean over the batch (TC-Padé's stability indicator without its factor 1/2);
    [2] relative L2 error of the prediction that this step would have got, worst sample. It says
        nothing on a run's first step, when the history is empty.
    """
    dims = list(range(1, actual.dim()))
    actual = actual.float()
    finite = torch.isfinite(actual).all().float()
    error = actual - predicted.float()
    relative = safe_divide(inner(error, error, dims), inner(actual, actual, dims)).sqrt().amax()
    if len(residuals) < 2:
        turn = torch.zeros_like(finite)
    else:
        newest, before = (residual.float() for residual in residuals[:2])
        now, earlier = actual - newest, newest - before
        norms = (inner(now, now, dims) * inner(earlier, earlier, dims)).sqrt()
        cosine = safe_divide(inner(now, earlier, dims), norms)
        turn = (2 - 2 * cosine).clamp(min=0).sqrt().mean()
    return torch.stack([finite, turn, relative])
