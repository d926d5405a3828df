"""`dynamic_linear`: a linear layer whose matrix is a mixture of each row's own.

The operator `accel::dynamic_linear`, forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..costs import COSTS
from ..devices import kernels_for
from ..errors import OptionError
from ..exports import EXPORT_BODIES
from . import reference

__all__ = ["dynamic_linear"]


def _kernels(input: Tensor) -> Any:
    """The module with `dynamic_linear` and `gradients` for a tensor's device."""
    return kernels_for(input, reference, f"{__package__}.gpu", "the dynamic linear layer")


@torch.library.custom_op("accel::dynamic_linear", mutates_args=())
def _dynamic_linear(input: Tensor, vector: Tensor, weight: Tensor, base: Tensor) -> Tensor:
    result: Tensor = _kernels(input).dynamic_linear(input, vector, weight, base)
    return result


@_dynamic_linear.register_fake
def _(input: Tensor, vector: Tensor, weight: Tensor, base: Tensor) -> Tensor:
    return input.new_empty(input.shape[0], weight.shape[2])


@torch.library.custom_op("accel::dynamic_linear_backward", mutates_args=())
def _dynamic_linear_backward(
    gradient: Tensor, input: Tensor, vector: Tensor, weight: Tensor, base: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _kernels(input).gradients(
        gradient, input, vector, weight, base
    )
    return found


@_dynamic_linear_backward.register_fake
def _(gradient: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(each.new_empty(each.shape) for each in inputs)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, gradient: Tensor) -> Any:
    return torch.ops.accel.dynamic_linear_backward(gradient, *ctx.saved_tensors)


_dynamic_linear.register_autograd(_differentiate, setup_context=_save)
EXPORT_BODIES[torch.ops.accel.dynamic_linear.default] = reference.dynamic_linear


def _flops(input: Tensor, vector: Tensor, weight: Tensor, base: Tensor) -> Any:
    return 2 * input.shape[0] * input.shape[1] * base.shape[1] * (vector.shape[1] + 1)


COSTS[torch.ops.accel.dynamic_linear.default] = _flops


def dynamic_linear(input: Tensor, vector: Tensor, weight: Tensor, base: Tensor) -> Tensor:
    """input[r] @ (sum over h of vector[r, h] * weight[h] + base), for each row r.

    input: [R, K]. vector: [R, H], what each row's matrix is generated from. weight: [H, K, N], the
    last layer of a hypernetwork, reshaped; base: [K, N], its bias. Returns [R, N]. No row's matrix
    is written anywhere, so it is for few rows of each vector; with many of one vector, make its
    matrix and multiply by that. After the generated layers of DUET and SOLID (arXiv 2408.00123).

    Raises OptionError for shapes, types or devices that do not fit together.
    """
    shapes = [tuple(each.shape) for each in (input, vector, weight, base)]
    if (
        [len(each) for each in shapes] != [2, 2, 3, 2]
        or shapes[1] != (shapes[0][0], shapes[2][0])
        or shapes[2][1:] != shapes[3]
        or shapes[0][1] != shapes[3][0]
    ):
        raise OptionError(
            f"input, vector, weight and base have shapes {', '.join(map(str, map(list, shapes)))}; "
            "needed are [R, K], [R, H], [H, K, N] and [K, N]"
        )
    tensors = (input, vector, weight, base)
    if len({each.dtype for each in tensors}) > 1 or len({each.device for each in tensors}) > 1:
        kinds = ", ".join(f"{each.dtype} on {each.device}" for each in tensors)
        raise OptionError(f"input, vector, weight and base are {kinds}; needed is one of each")
    result: Tensor = torch.ops.accel.dynamic_linear(input, vector, weight, base)
    return result
