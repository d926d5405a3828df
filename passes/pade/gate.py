"""The stability gate: whether the last computed step allows the next ones to be skipped."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...kernels.errors import OptionError
from ...kernels.predictors import Signals

__all__ = ["Gate"]

SCORES = ("half-chord", "chord", "chord-sum", "error")


@dataclass(frozen=True)
class Gate:
    """Skip only where a score of the last computed step passes a threshold.

    TC-Padé's stability indicator is printed as half the chord of the angle between the last two
    residual differences, with "skip where it is at least theta"; its thresholds fit no single
    reading. All readings are here:

    score: "half-chord" (as printed, in [0, 1]); "chord" (in [0, 2]); "chord-sum" (the length of
        the directions' sum, in [0, 2]: large where they agree); "error" (ours: the relative L2
        error that the predictor would have made on the last computed step).
    skip_if: "<" or ">=".
    """

    score: str = "chord"
    skip_if: str = "<"
    threshold: float = 1.4

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise OptionError(f"gate score {self.score!r} is none of {', '.join(SCORES)}")
        if self.skip_if not in ("<", ">="):
            raise OptionError(f"gate skip_if {self.skip_if!r} is neither '<' nor '>='")
        if not math.isfinite(self.threshold):
            raise OptionError(f"gate threshold is {self.threshold}; it has to be finite")

    def value(self, signals: Signals) -> float:
        """The score itself."""
        if self.score == "error":
            return signals.error
        if self.score == "half-chord":
            return signals.turn / 2
        if self.score == "chord":
            return signals.turn
        return math.sqrt(max(0.0, 4 - signals.turn**2))

    def allows(self, signals: Signals) -> bool:
        """Whether the steps after a computed step with these signals may be skipped."""
        below = self.value(signals) < self.threshold
        return below if self.skip_if == "<" else not below
