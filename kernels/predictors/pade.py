"""accel's own predictor: the Shanks transform of the residual sequence in real time (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OptionError
from .base import inner, per_sample, safe_divide, trusted_or

__all__ = ["Pade"]

NEWTON_STEPS = 2  # error below 1e-5 by then; every further one lengthens compilation


def _sinhc(z: Tensor) -> Tensor:
    """sinh(z) / z, finite everywhere (its argument is clamped to where float32 can hold it)."""
    z = z.clamp(-40.0, 40.0)
    small = z.abs() < 1e-2
    large = torch.where(small, 1.0, z)
    return torch.where(small, 1 + z * z / 6, torch.sinh(large) / large)


def _langevin(z: Tensor) -> Tensor:
    """coth(z) - 1/z, the derivative of log(sinhc(z))."""
    small = z.abs() < 1e-1
    large = torch.where(small, 1.0, z)
    return torch.where(small, z / 3 - z * z * z / 45, 1 / torch.tanh(large) - 1 / large)


@dataclass(frozen=True)
class Pade:
    """Rational forecast through the last three residuals with one bounded ratio per sample.

    On even spacing it is the classical Shanks transform, the [k/1] Padé approximant of the
    sequence's generating function: with differences d1 (newest) and d2 (the one before),

        q = |d1| / |d2|,    R(k) = R + d1 (q + q^2 + ... + q^k) = R + d1 q (1-q^k)/(1-q)

    (Shanks 1955; a quotient of norms in place of an elementwise one removes the poles. The inner
    product <d1, d2> / <d2, d2> is always smaller, damps too much, and costs 1 to 2 dB on the
    reference model.) Where d1 turns back on d2, the forecast stays at R.
    On uneven spacing the same curve is R(t) = A + B exp(-x t / g), with x fitted to the ratio by
    Newton's method on scalars. Exact on constants, on straight lines and on geometric decay,
    whatever the spacing; scale-equivariant.

    granularity: over what one ratio is shared: "sample" (all of a sample's values), "channel"
        (last dimension) or "token" (all but the last).
    growth: the largest allowed growth rate -x per newest gap; 0 forbids forecasts beyond the
        straight line.
    """

    granularity: str = "sample"
    growth: float = 0.0
    decay: float = 6.0
    keeps_predictions: bool = False
    reads_inputs: bool = False
    history: int = 3

    def __post_init__(self) -> None:
        if self.granularity not in ("sample", "channel", "token"):
            raise OptionError(
                f"granularity {self.granularity!r} is none of 'sample', 'channel', 'token'"
            )

    def predict(
        self,
        residuals: Sequence[Tensor],
        times: Tensor,
        remaining: Tensor,
        inputs: Sequence[Tensor],
    ) -> Tensor:
        newest, middle, oldest = (residual.float() for residual in residuals)
        last, previous = newest - middle, middle - oldest
        ndim = newest.dim()
        dims = {
            "sample": list(range(1, ndim)),
            "channel": list(range(1, ndim - 1)),
            "token": [ndim - 1],
        }[self.granularity]

        gap = per_sample(times[2] - times[1], newest)
        earlier_gap = per_sample(times[3] - times[2], newest)
        ahead = safe_divide(per_sample(times[1] - times[0], newest), gap)  # in newest gaps
        spread = safe_divide(earlier_gap, gap)

        # For R = A + B exp(-x t / gap):  |d1| / |d2| = (1 - e^-x) / (e^(x spread) - 1).
        size = inner(previous, previous, dims)
        ratio = safe_divide(inner(last, last, dims), size).sqrt() * spread
        ratio = torch.where(inner(last, previous, dims) > 0, ratio, 0.0)  # turned back: go nowhere
        known = (spread > 0) & torch.isfinite(ratio) & (size > 0)
        target = torch.log(torch.where(known, ratio, 1.0).clamp(1e-6, 1e6))
        x = (-2 * target / (1 + spread)).clamp(-self.growth, self.decay)
        for _ in range(NEWTON_STEPS):
            value = -x * (1 + spread) / 2 + torch.log(_sinhc(x / 2) / _sinhc(spread * x / 2))
            slope = (_langevin(x / 2) - spread * _langevin(spread * x / 2) - 1 - spread) / 2
            x = (x - (value - target) / slope).clamp(-self.growth, self.decay)
        # Two residuals only: nothing is known of the ratio, so go straight (x = 0).
        x = torch.where(known, x, 0.0)
        multiplier = ahead * torch.exp(-x * (1 + ahead) / 2) * _sinhc(ahead * x / 2) / _sinhc(x / 2)
        return trusted_or(newest, newest + multiplier * last)
