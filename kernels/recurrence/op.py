"""The operator `accel::recurrence`, for inference.

A compiler that sees a GRU's steps compiles each of them: Inductor took minutes for two GRUs over 50
items (torch 2.13). As an operator it is one call, and takes no longer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..exports import EXPORT_BODIES
from . import reference

__all__ = ["OPERATOR", "recurrence"]

FEW = 64  # sequences; below, torch's own loop is the faster one (measured on 2 CPU cores)


@torch.library.custom_op("accel::recurrence", mutates_args=())
def _recurrence(gates: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with torch.autocast(gates.device.type, enabled=False):
        return _states(gates, state, weight, bias)


def _states(gates: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    width = state.shape[1]
    if len(gates) < FEW or gates.device.type != "cpu":
        # A GRU whose inputs are its gates: their projection is the identity.
        same = torch.eye(3 * width, dtype=gates.dtype, device=gates.device)
        weights = [same, weight, torch.zeros_like(bias), bias]
        begin = state[None].contiguous()
        states: Tensor = torch.gru(gates, begin, weights, True, 1, 0.0, False, False, True)[0]
        return states.contiguous()
    steps = gates.transpose(0, 1).contiguous()
    states = state.new_empty(len(steps), *state.shape)
    transposed = weight.t()
    for step, result in zip(steps.unbind(0), states.unbind(0), strict=True):
        own = torch.addmm(bias, state, transposed)
        both = torch.sigmoid(step[:, : 2 * width] + own[:, : 2 * width])
        new = torch.addcmul(step[:, 2 * width :], both[:, :width], own[:, 2 * width :]).tanh_()
        state = torch.lerp(new, state, both[:, width:], out=result)
    return states.transpose(0, 1).contiguous()


@_recurrence.register_fake
def _(gates: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return gates.new_empty(*gates.shape[:2], state.shape[1])


OPERATOR = torch.ops.accel.recurrence.default
EXPORT_BODIES[OPERATOR] = reference.recurrence


def recurrence(gates: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The states [B, L, H] of a GRU.

    gates: [B, L, 3 H], the inputs' part of the gates (reset, update, new), with its bias. state:
    [B, H], that before the first step. weight, bias: [3 H, H] and [3 H], the states' part. As
    `torch.nn.GRU` orders and computes them, all of one type. No gradients.
    """
    result: Tensor = torch.ops.accel.recurrence(gates, state, weight, bias)
    return result
