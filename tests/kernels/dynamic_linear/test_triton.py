"""The Triton kernels, run by Triton's interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
from accel.kernels.dynamic_linear import gpu
from torch import Tensor

from ...triton_interpreter import as_on_a_gpu
from .test_op import inputs, one_matrix_a_row


def relative(found: Tensor, expected: Tensor) -> float:
    """Relative L2 error."""
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3), (torch.float16, 1e-3)]
)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (33, 3, 17, 35), (65, 2, 64, 32), (5, 4, 100, 3), (3, 0, 16, 16)]
)
def test_values_and_gradients(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, bound: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    as_on_a_gpu(monkeypatch)
    exact = [each.detach().to(dtype).double().requires_grad_()
             for each in inputs(*sizes, torch.float32)]  # fmt: skip
    given = [each.detach().to(dtype) for each in exact]
    expected = one_matrix_a_row(*exact)
    slope = torch.randn_like(expected).to(dtype)
    wanted = torch.autograd.grad(expected, exact, slope.double())
    found = [gpu.dynamic_linear(*given), *gpu.gradients(slope, *given)]
    for one, other in zip(found, [expected.detach(), *wanted], strict=True):
        assert one.dtype == dtype
        assert one.shape == other.shape
        assert relative(one, other) < bound


def test_no_rows() -> None:
    given = [each.detach() for each in inputs(0, 2, 3, 4, torch.float32)]
    assert gpu.dynamic_linear(*given).shape == (0, 4)
    found = gpu.gradients(torch.zeros(0, 4), *given)
    assert all(not bool(each.any()) for each in found)
    assert [each.shape for each in found] == [each.shape for each in given]
