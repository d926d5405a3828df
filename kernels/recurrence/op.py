"""The operator `accel::recurrence`, for inference.

A compiler that sees a GRU's steps compiles each of them: Inductor took minutes for two GRUs over 50
items (torch 2.13). As an operator it is one call, and takes no longer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..costs import COSTS
from ..errors import OptionError
from ..exports import EXPORT_BODIES
from . import cpu, reference
from .aten import through_gru

__all__ = ["OPERATOR", "recurrence"]


def _recurrence(gates: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    given = gates, state, weight, bias
    _check(*given)
    if torch.is_grad_enabled() and any(each.requires_grad for each in given):
        raise OptionError(
            "accel::recurrence has no gradients: call it under torch.no_grad(), or train with "
            "torch.nn.GRU"
        )
    return (cpu.recurrence if gates.device.type == "cpu" else through_gru)(*given)


def _check(gates: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Before compiled code reads memory by these sizes. At every call, so without detours."""
    if (
        gates.dim() == 3
        and state.dim() == 2
        and gates.dtype is state.dtype is weight.dtype is bias.dtype
    ):
        batch, width = state.shape
        if (
            gates.shape[0] == batch
            and gates.shape[2] == 3 * width
            and weight.shape == (3 * width, width)
            and bias.shape == (3 * width,)
        ):
            return
    found = ", ".join(f"{each.dtype} {list(each.shape)}" for each in (gates, state, weight, bias))
    raise OptionError(
        f"gates, state, weight and bias are {found}; needed are [B, L, 3 H], [B, H], [3 H, H] and "
        "[3 H] of one type"
    )


def _like(gates: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return gates.new_empty(*gates.shape[:2], state.shape[1])


def _flops(gates: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> Any:
    return 2 * gates.shape[0] * gates.shape[1] * state.shape[1] * gates.shape[2]


# Not a `custom_op`: what that does around each call takes longer than a short recurrence.
_LIBRARY = torch.library.Library("accel", "FRAGMENT")
if not hasattr(torch.ops.accel, "recurrence"):  # else this file is loaded again
    _LIBRARY.define(
        "recurrence(Tensor gates, Tensor state, Tensor weight, Tensor bias) -> Tensor",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    _LIBRARY.impl("recurrence", _recurrence, "CompositeExplicitAutograd")
    torch.library.register_fake("accel::recurrence", _like, lib=_LIBRARY)
OPERATOR = torch.ops.accel.recurrence.default
EXPORT_BODIES[OPERATOR] = reference.recurrence
COSTS[OPERATOR] = _flops


def recurrence(gates: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The states [B, L, H] of a GRU.

    gates: [B, L, 3 H], the inputs' part of the gates (reset, update, new), with its bias. state:
    [B, H], that before the first step. weight, bias: [3 H, H] and [3 H], the states' part. As
    `torch.nn.GRU` orders and computes them, all of one type. No gradients. Raises OptionError where
    they would be needed, and for shapes and types that do not fit together.
    """
    result: Tensor = torch.ops.accel.recurrence(gates, state, weight, bias)
    return result
