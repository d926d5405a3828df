"""A predictor whose slopes were read off a recorded run of the very model (ours)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import OptionError
from .base import MOMENTS, AlongDifferences, Predictor, distinct, safe_divide, usable

__all__ = ["Recorded", "same_form"]


@dataclass(frozen=True)
class Recorded(AlongDifferences):
    """The line through the last two residuals, with the slope that was best in a recorded run.

    Of a run whose steps were all computed, the inner products of its residuals say for any two
    known steps a, b and any step t which c makes

        R(b) + c (R(b) - R(a))

    closest to R(t): c = <R(t) - R(b), R(b) - R(a)> / <R(b) - R(a), R(b) - R(a)>. Where in the
    recorded run a step belongs is told by how much of its own run is left; between recorded steps
    residuals are taken to lie on straight lines. With one residual known it is reused.

    That reproduces constants, and scales as residuals do. Slopes for both of the last two
    differences fit the recorded run better and sampled worse, on a Flux and on the reference model.

    times: of the recorded run's steps, in their order. products: `[steps][steps]`, the inner
    products of their residuals, summed over samples and calls.
    Raises OptionError where these do not fit each other.
    """

    times: tuple[float, ...]
    products: tuple[tuple[float, ...], ...]
    granularity: str = "sample"
    keeps_predictions: bool = False
    reads_inputs: bool = False
    history: int = 3

    _products: ClassVar[Tensor]  # each object's own; no field, by which objects are compared

    def __post_init__(self) -> None:
        steps = len(self.times)
        falling = sorted(self.times, reverse=True)
        if steps < 3 or len(set(self.times)) < steps or list(self.times) not in (
            falling, falling[::-1]
        ):  # fmt: skip
            raise OptionError(
                f"the times of a recorded run are {self.times}; they have to be three or more that "
                "fall, or rise, from step to step"
            )
        if [len(row) for row in self.products] != [steps] * steps:
            raise OptionError(f"a recorded run of {steps} steps has {steps} x {steps} products")
        # Once, not at every step: of 1,000 steps there are a million.
        object.__setattr__(self, "_products", torch.tensor(self.products, dtype=torch.float64))

    def coefficients(self, times: Tensor, remaining: Tensor, moments: Tensor) -> Tensor | None:
        recorded = times.new_tensor(self.times)
        # A constant that is added to times, such as embedded guidance, is none of theirs.
        last = len(self.times) - 1
        position = (1 - remaining) * len(self.times)
        here = (_hats(times.new_tensor(range(last + 1)), position) * recorded).sum()
        # More steps than were recorded go on as far as the last two are apart.
        here = here + (position - last).clamp(min=0) * (recorded[-1] - recorded[-2])
        shares = _hats(recorded, here + times - times[0])  # [history + 1, batch, steps]
        to_predict, newest, before = shares[0], shares[1], shares[2]
        # Of a constant made beforehand: so an exported graph takes it in.
        products = torch.ops.aten.lift_fresh(self._products).to(times)
        along = newest - before
        wanted = (((to_predict - newest) @ products) * along).sum(-1)
        slope = safe_divide(wanted, ((along @ products) * along).sum(-1))
        known = distinct(times[1:])[1]
        slope = torch.where(known, slope, 0.0)
        both = torch.stack([slope, torch.zeros_like(slope)])
        return usable(both.reshape([*both.shape, *[1] * (moments.dim() - 2)]))


def same_form(predictor: Predictor) -> bool:
    """Whether a graph that was compiled with a predictor can be given recorded slopes instead: it
    reads as many residuals, and takes a coefficient for each difference and sample."""
    form = predictor.history, predictor.granularity
    if not isinstance(predictor, AlongDifferences) or form != (Recorded.history, "sample"):
        return False
    blank = torch.zeros(Recorded.history + 1, 1), torch.ones(()), torch.zeros(MOMENTS, 1, 1)
    known = predictor.coefficients(*blank)
    return known is not None and known.shape == (2, 1, 1)


def _hats(nodes: Tensor, at: Tensor) -> Tensor:
    """How much of each node's value there is in the values at some places, on straight lines
    between the nodes: `[*places, nodes]`. Beyond the ends, all of the end's."""
    low, high = torch.minimum(nodes[0], nodes[-1]), torch.maximum(nodes[0], nodes[-1])
    at = at.clamp(low, high).unsqueeze(-1)
    rising = (at - nodes[:-1]) / (nodes[1:] - nodes[:-1])
    ends = torch.ones_like(at)
    left = torch.cat([ends, rising], -1)
    right = torch.cat([1 - rising, ends], -1)
    return torch.minimum(left, right).clamp(0, 1)
