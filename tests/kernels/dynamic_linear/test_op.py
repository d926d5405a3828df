"""The operator: its reference, gradients, registration and refusals."""

from __future__ import annotations

import pytest
import torch
from accel.kernels.dynamic_linear import dynamic_linear
from accel.kernels.dynamic_linear.reference import gradients
from accel.kernels.errors import OptionError
from torch import Tensor

SIZES = [(5, 3, 4, 6), (1, 1, 1, 1), (7, 0, 3, 2), (0, 2, 3, 4), (2, 5, 33, 17)]


def inputs(rows: int, count: int, size: int, out: int, dtype: torch.dtype) -> list[Tensor]:
    """input, vector, weight and base; seeded."""
    torch.manual_seed(rows + out)
    shapes = (rows, size), (rows, count), (count, size, out), (size, out)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def one_matrix_a_row(input: Tensor, vector: Tensor, weight: Tensor, base: Tensor) -> Tensor:
    """What it means, with every row's matrix written out."""
    matrices = torch.einsum("rh,hkn->rkn", vector, weight) + base
    return torch.einsum("rk,rkn->rn", input, matrices)


@pytest.mark.parametrize("sizes", SIZES)
def test_values_and_gradients(sizes: tuple[int, int, int, int]) -> None:
    given = inputs(*sizes, torch.float64)
    found, expected = dynamic_linear(*given), one_matrix_a_row(*given)
    torch.testing.assert_close(found, expected)
    slope = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, given, slope)
    torch.testing.assert_close(torch.autograd.grad(found, given, slope), wanted)
    torch.testing.assert_close(gradients(slope, *given), wanted)


def test_registration() -> None:
    torch.library.opcheck(
        torch.ops.accel.dynamic_linear.default, tuple(inputs(5, 3, 4, 6, torch.float32))
    )


@torch.no_grad()
def test_one_graph() -> None:
    given = inputs(5, 3, 4, 6, torch.float32)
    run = torch.compile(dynamic_linear, fullgraph=True)
    torch.testing.assert_close(run(*given), one_matrix_a_row(*given))


@pytest.mark.parametrize(
    ("which", "shape"), [(0, (5, 3)), (1, (4, 3)), (1, (5, 2)), (2, (3, 4)), (3, (4, 5)), (3, (6,))]
)
def test_shapes_that_do_not_fit(which: int, shape: tuple[int, ...]) -> None:
    given = inputs(5, 3, 4, 6, torch.float32)
    given[which] = torch.zeros(shape)
    with pytest.raises(OptionError, match="needed are"):
        dynamic_linear(*given)


def test_types_that_do_not_fit() -> None:
    given = inputs(5, 3, 4, 6, torch.float32)
    with pytest.raises(OptionError, match="needed is one of each"):
        dynamic_linear(given[0].double(), *given[1:])
