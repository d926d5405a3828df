"""The dynamic linear layer on GPUs: launching the Triton kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import triton as kernels

__all__ = ["Blocks", "blocks_for", "dynamic_linear", "gradients"]


class Blocks(NamedTuple):
    """Sizes of a program's tiles, and how many warps work on them."""

    rows: int
    inputs: int
    outputs: int
    warps: int
    stages: int

    @property
    def constants(self) -> dict[str, int]:
        """As the kernels name them."""
        return {"BLOCK_R": self.rows, "BLOCK_K": self.inputs, "BLOCK_N": self.outputs}


def blocks_for(size: int) -> Blocks:
    """The largest, of those tried, that do not spill on any of the four targets (`resources`).

    size: bytes of a number.
    """
    if size == 2:
        return Blocks(rows=64, inputs=32, outputs=32, warps=4, stages=2)
    return Blocks(rows=32, inputs=16, outputs=32, warps=4, stages=2)


def _launch(kernel: Any, grid: tuple[int, int, int], blocks: Blocks, *arguments: Any) -> None:
    kernel[grid](*arguments, **blocks.constants, num_warps=blocks.warps, num_stages=blocks.stages)


def _count(size: int, block: int) -> int:
    return -(-size // block)


def dynamic_linear(input: Tensor, vector: Tensor, weight: Tensor, base: Tensor) -> Tensor:
    """See `op.dynamic_linear`."""
    input, vector, weight, base = (each.contiguous() for each in (input, vector, weight, base))
    (rows, inputs), (count, _, outputs) = input.shape, weight.shape
    result = input.new_empty(rows, outputs)
    blocks = blocks_for(input.element_size())
    if rows:
        grid = _count(rows, blocks.rows), _count(outputs, blocks.outputs), 1
        _launch(
            kernels.rows_kernel, grid, blocks, input, vector, weight, base, result, rows, count,
            inputs, outputs, outputs, 1,
        )  # fmt: skip
    return result


def gradients(
    gradient: Tensor, input: Tensor, vector: Tensor, weight: Tensor, base: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of input, vector, weight and base, given that of the result."""
    gradient, input, vector, weight, base = (
        each.contiguous() for each in (gradient, input, vector, weight, base)
    )
    (rows, inputs), (count, _, outputs) = input.shape, weight.shape
    of_input, of_vector = torch.empty_like(input), torch.empty_like(vector)
    of_weight, of_base = torch.empty_like(weight), torch.empty_like(base)
    blocks = blocks_for(input.element_size())
    if rows:
        grid = _count(rows, blocks.rows), _count(inputs, blocks.outputs), 1
        _launch(
            kernels.rows_kernel, grid, blocks, gradient, vector, weight, base, of_input, rows,
            count, outputs, inputs, 1, outputs,
        )  # fmt: skip
        if count:
            grid = _count(rows, blocks.rows), count, 1
            _launch(
                kernels.vector_gradient_kernel, grid, blocks, gradient, input, weight, of_vector,
                rows, count, inputs, outputs,
            )  # fmt: skip
    grid = _count(inputs, blocks.inputs), _count(outputs, blocks.outputs), count + 1
    _launch(
        kernels.weight_gradient_kernel, grid, blocks, gradient, input, vector, of_weight, of_base,
        rows, count, inputs, outputs,
    )  # fmt: skip
    return of_input, of_vector, of_weight, of_base
