"""accel's own predictor: the Shanks transform of the residual sequence in real time (ours)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OptionError
from .base import GRANULARITIES, AlongDifferences, safe_divide, usable

__all__ = ["Pade"]

NEWTON_STEPS = 3  # exact at once on even spacing; else the error is below 1e-6 by then
STRAIGHT = 1e-6  # a rate below which the curve counts as a straight line


@dataclass(frozen=True)
class Pade(AlongDifferences):
    """Rational forecast through the last three residuals with one bounded ratio per sample.

    On even spacing it is the classical Shanks transform, the [k/1] Padé approximant of the
    sequence's generating function: with differences d1 (newest) and d2 (the one before),

        q = |d1| / |d2|,    R(k) = R + d1 (q + q^2 + ... + q^k) = R + d1 q (1-q^k)/(1-q)

    (Shanks 1955; a quotient of norms in place of an elementwise one removes the poles. The inner
    product <d1, d2> / <d2, d2> is always smaller, damps too much, and costs 1 to 2 dB on the
    reference model.) Where d1 turns back on d2, the forecast follows
    the line by `turned`.
    On uneven spacing the same curve is R(t) = A + B exp(-x t / g), with x fitted to the ratio by
    Newton's method on scalars.

    That curve keeps the direction of d1. Where d1 has turned away from d2, part of the turn goes
    on: the forecast also moves along what of d2 is at right angles to d1, by `turn` times what the
    parabola through the three residuals would. Exact on constants, on straight lines and on
    geometric decay, whatever the spacing; scale-equivariant.

    granularity: over what one ratio is shared: "sample" (all of a sample's values), "channel"
        (last dimension) or "token" (all but the last).
    growth: the largest allowed growth rate -x per newest gap; 0 forbids forecasts beyond the
        straight line.
    decay: the largest decay rate x per newest gap.
    start: the slope while two residuals are known, of which the line through them would have 1: on
        trained models the first is an outlier as often as not.
    turned: the same where d1 has turned back on d2, which says nothing of the steps to come; 0
        reuses R. "pade-damped" has 0.3 and 0.75, which lose 1 dB on the reference model and gain
        up to 9 on others (examples/generators/results).
    turn: 0 ignores the turn, 1 continues all of it. 0.3 gave 1 to 1.5 dB over 0 on the reference
        model at 6, 8 and 10 full steps of 20; 0.2 and 0.4 are within 0.4 dB of it.
    """

    granularity: str = "sample"
    growth: float = 0.0
    decay: float = 6.0
    turn: float = 0.3
    start: float = 1.0
    turned: float = 0.0
    keeps_predictions: bool = False
    reads_inputs: bool = False
    history: int = 3

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES:
            known = ", ".join(map(repr, GRANULARITIES))
            raise OptionError(f"granularity {self.granularity!r} is none of {known}")

    def coefficients(self, times: Tensor, remaining: Tensor, moments: Tensor) -> Tensor | None:
        size_last, size_before, together = moments[:3]
        times = times.reshape([*times.shape, *[1] * (size_last.dim() - 1)])
        gap = times[2] - times[1]
        ahead = safe_divide(times[1] - times[0], gap)  # in newest gaps
        spread = safe_divide(times[3] - times[2], gap)

        young = ~(spread > 0)  # two residuals only

        # For R = A + B exp(-x t / gap):  |d1| / |d2| = (1 - e^-x) / (e^(x spread) - 1).
        ratio = safe_divide(size_last, size_before).sqrt() * spread
        ratio = torch.where(together > 0, ratio, 0.0)  # turned back: go nowhere
        known = (spread > 0) & torch.isfinite(ratio) & (size_before > 0)
        target = torch.log(torch.where(known, ratio, 1.0).clamp(1e-6, 1e6))
        spread = torch.where(known, spread, 1.0)
        x = self._bounded(-2 * target / (1 + spread))
        for _ in range(NEWTON_STEPS):
            left, right = torch.expm1(-x), torch.expm1(spread * x)
            value = torch.log(-left * spread / right)
            slope = -1 - 1 / left - spread * (1 + 1 / right)
            x = self._bounded(x - (value - target) / slope)
        # Two residuals only: nothing is known of the ratio, so go straight.
        x = torch.where(known, x, STRAIGHT)
        straight = -torch.expm1(-x * ahead) / torch.expm1(x)
        straight = torch.where(young, self.start * ahead, straight)
        straight = torch.where(known & (together <= 0), self.turned * ahead, straight)

        # A parabola adds, to the straight line along d1, `turned` times d1 - d2 / spread.
        turned = self.turn * ahead * (1 + ahead) / (1 + spread)
        turned = torch.where(known & (together > 0), turned, 0.0)
        # Without its component along d1, of which the curve above takes care.
        along = safe_divide(together, size_last * spread)
        multipliers = torch.stack([straight + turned * along, -turned / spread])
        return usable(multipliers)

    def _bounded(self, x: Tensor) -> Tensor:
        """A rate within the bounds, and far enough from 0 to divide by what becomes of it."""
        x = x.clamp(-self.growth, self.decay)
        return torch.where(x.abs() < STRAIGHT, STRAIGHT, x)
