"""What a residual predictor is, and the moments by which a computed step judges it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = [
    "GRANULARITIES", "MOMENTS", "AlongDifferences", "Predictor", "Signals", "along_differences",
    "differences_of", "distinct", "inner", "judge", "judged", "moments", "reduced_dims",
    "safe_divide", "trusted_or", "usable",
]  # fmt: skip

GRANULARITIES = ("sample", "channel", "token")
MOMENTS = 5
LARGEST = 2.0**20  # of a coefficient; float32 has 24 bits


class Predictor(Protocol):
    """Forecasts a stack's residual (output minus input) from those of earlier steps.

    In two parts. `predict` is large and simple: it goes into the skip branch of a graph, as plain
    torch without control flow on values. `coefficients` is small and may be involved: whoever runs
    the graph evaluates it before each step, from the times and from the `moments` that the last
    computed step returned. It too is plain torch without control flow on values, so that an
    exported graph can contain it.

    A constant history is reproduced, whatever the times; scaled residuals give the scaled forecast;
    nothing finite gives NaN or Inf. Implementations are frozen dataclasses, so that equal ones are
    known for equal.
    """

    @property
    def history(self) -> int:
        """How many earlier residuals `predict` reads."""

    @property
    def granularity(self) -> str:
        """Over what one moment is taken, one of `GRANULARITIES`: see `reduced_dims`."""

    @property
    def keeps_predictions(self) -> bool:
        """Whether predicted residuals enter the history too (only TC-Padé's release does)."""

    @property
    def reads_inputs(self) -> bool:
        """Whether `predict` needs the stack's current and previous input."""

    def coefficients(self, times: Tensor, remaining: Tensor, moments: Tensor) -> Tensor | None:
        """What `predict` has to know of the step: `[count, batch]` or `[count, batch, ...]`.

        times: `[history + 1, batch]`, in the sampler's own unit; row 0 is the step to predict,
            row 1 the newest residual, and so on. A run younger than that repeats its oldest
            entry, time included.
        remaining: 0-d, the fraction of the run still to go (1 at the first step).
        moments: those of the newest residual, `[MOMENTS, batch, ...]`; see `moments`.
        All of them float64, and so is the result. None: nothing needed.
        """

    def predict(
        self, residuals: Sequence[Tensor], coefficients: Tensor | None, inputs: Sequence[Tensor]
    ) -> Tensor:
        """The residual of the step, float32, of the shape of each residual, as a new tensor.

        residuals: `history` tensors `[batch, ...]`, newest first. coefficients: as returned by
        the method of that name, as float32. inputs: the stack's input now and on the step before,
        where `reads_inputs`; else empty.
        """


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


def along_differences(residuals: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """R_0 + c_0 (R_0 - R_1) + c_1 (R_1 - R_2) + ..., residuals R newest first.

    Every forecast that is linear in the residuals and reproduces constants has this form, in which
    it reproduces them to the last bit. Where the result overflows it stays at R_0.
    """
    newest = residuals[0].float()
    result = newest
    for index in range(coefficients.shape[0]):
        weight = coefficients[index]
        while weight.dim() < newest.dim():
            weight = weight.unsqueeze(-1)
        difference = residuals[index].float() - residuals[index + 1].float()
        result = result + weight * difference
    return trusted_or(newest, result)


class AlongDifferences:
    """`predict` of a predictor whose coefficients are those of `along_differences`."""

    def predict(
        self, residuals: Sequence[Tensor], coefficients: Tensor | None, inputs: Sequence[Tensor]
    ) -> Tensor:
        """See `Predictor`."""
        assert coefficients is not None
        return along_differences(residuals, coefficients)


def distinct(times: Tensor) -> Tensor:
    """Which entries of a history say something: bool, of the shape of their times.

    times: `[history, batch]`, newest first. A repeated time marks missing history: that entry and
    all older ones drop out, for each sample by itself. The newest is always known.
    """
    known = [torch.ones_like(times[0], dtype=torch.bool)]
    for age in range(1, len(times)):
        known.append(known[-1] & (times[age] != times[:age]).all(0))
    return torch.stack(known)


def differences_of(weights: Tensor) -> Tensor:
    """What `along_differences` takes, `[history - 1, batch]`, for a weight of each residual.

    weights: `[history, batch]`, newest first, at least two; taken to sum to 1, so that of the
    newest is what the others leave.
    """
    return usable(-weights[1:].flip(0).cumsum(0).flip(0))


def usable(coefficients: Tensor) -> Tensor:
    """Coefficients of differences, and 0 (the newest residual) for a sample whose are too large.

    coefficients: `[history - 1, batch, ...]`. Times that nearly coincide give such. Beyond LARGEST
    they would mostly forecast the rounding of float32 residuals, and what overflows at one scale
    of the residuals would not at another.
    """
    # No comparison holds for what is not a number.
    return torch.where((coefficients.abs() <= LARGEST).all(0), coefficients, 0.0)


def reduced_dims(granularity: str, ndim: int) -> list[int]:
    """The dimensions of a residual that a moment sums over.

    granularity: "sample" (one moment for all of a sample's values), "channel" (one for each index
    of the last dimension) or "token" (one for each index of all but the last).
    """
    return {
        "sample": list(range(1, ndim)),
        "channel": list(range(1, ndim - 1)),
        "token": [ndim - 1],
    }[granularity]


def moments(
    actual: Tensor, residuals: Sequence[Tensor], predicted: Tensor, granularity: str
) -> Tensor:
    """All that a computed step says about predictability: float32 `[MOMENTS, batch, ...]`.

    actual: the residual just computed, `[batch, ...]`; residuals: earlier ones, newest first (at
    least one); predicted: what the predictor would have said. With d1 = actual - newest and
    d2 = newest - the one before (0 where only one is known), and each summed as `reduced_dims`
    says: [0] <d1, d1>, [1] <d2, d2>, [2] <d1, d2>, [3] <actual, actual>, [4] <e, e> of the
    error e = actual - predicted. Dimensions summed over stay as size 1.
    """
    dims = reduced_dims(granularity, actual.dim())
    actual = actual.float()
    newest = residuals[0].float()
    last = actual - newest
    before = newest - residuals[1].float() if len(residuals) > 1 else torch.zeros_like(newest)
    error = actual - predicted.float()
    pairs = [(last, last), (before, before), (last, before), (actual, actual), (error, error)]
    return torch.stack([inner(left, right, dims) for left, right in pairs])


@dataclass(frozen=True)
class Signals:
    """What a computed step said about predictability, over all streams and samples.

    finite: every value of every residual was finite.
    turn: the chord between the directions of the last two residual differences, in [0, 2], mean
        over the batch, largest of the streams (TC-Padé's stability indicator without its factor
        1/2).
    error: relative L2 error of the prediction that this step would have got, of the worst sample.
        It says nothing on a run's first step, when there was nothing to predict from.
    """

    finite: bool
    turn: float
    error: float


def judge(measured: Sequence[Tensor]) -> Signals:
    """The signals in the moments of all streams, each `[MOMENTS, batch, ...]`."""
    finite, turn, error = judged(measured)
    return Signals(bool(finite), float(turn), float(error))


def judged(measured: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What `Signals` holds, as 0-d tensors, so that a graph can contain it."""
    finite, turn, error = [], [], []
    for each in measured:
        last, before, both, actual, wrong = each.double().flatten(2).sum(2)
        cosine = safe_divide(both, (last * before).sqrt())
        known = (last > 0) & (before > 0)
        chord = torch.where(known, (2 - 2 * cosine).clamp(min=0).sqrt(), 0.0)
        # Sums of squares: of a broken value, or of one too large to be squared, they are broken.
        finite.append(torch.isfinite(actual).all())
        turn.append(chord.mean())
        relative = safe_divide(wrong, actual).sqrt().max()
        error.append(torch.where(torch.isfinite(relative), relative, math.inf))
    return torch.stack(finite).all(), torch.stack(turn).max(), torch.stack(error).max()
