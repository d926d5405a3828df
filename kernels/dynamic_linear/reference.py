"""The dynamic linear layer, plainly: the oracle, and what runs on CPUs."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dynamic_linear", "gradients"]


def dynamic_linear(input: Tensor, vector: Tensor, weight: Tensor, base: Tensor) -> Tensor:
    """See `op.dynamic_linear`. One product of matrices, of the outer products of both inputs."""
    outer = (vector[:, :, None] * input[:, None]).flatten(1)
    return torch.addmm(input @ base, outer, weight.flatten(0, 1))


def gradients(
    gradient: Tensor, input: Tensor, vector: Tensor, weight: Tensor, base: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of input, vector, weight and base, given that of the result."""
    outer = gradient @ weight.flatten(0, 1).t()
    outer = outer.unflatten(1, weight.shape[:2])
    of_input = (outer * vector[:, :, None]).sum(1) + gradient @ base.t()
    of_vector = (outer * input[:, None]).sum(2)
    mixed = (vector[:, :, None] * input[:, None]).flatten(1)
    of_weight = (mixed.t() @ gradient).unflatten(0, weight.shape[:2])
    return of_input, of_vector, of_weight, input.t() @ gradient
