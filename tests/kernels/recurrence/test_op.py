"""The recurrence of a GRU without its inputs' part, against torch's."""

from __future__ import annotations

import pytest
import torch
from accel.kernels.recurrence import recurrence, reference
from torch import Tensor, nn


def given(batch: int, length: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What `nn.GRU` gives, and what comes to the same."""
    torch.manual_seed(0)
    gru = nn.GRU(4, 6, batch_first=True)
    inputs, begin = torch.randn(batch, length, 4), torch.randn(1, batch, 6)
    gates = nn.functional.linear(inputs, gru.weight_ih_l0, gru.bias_ih_l0)
    return gru(inputs, begin)[0], (gates, begin[0], gru.weight_hh_l0, gru.bias_hh_l0)


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 5), (63, 2), (64, 3), (100, 7)])
@torch.no_grad()
def test_it_is_a_gru(batch: int, length: int) -> None:
    expected, inputs = given(batch, length)
    torch.testing.assert_close(recurrence(*inputs), expected)
    torch.testing.assert_close(reference.recurrence(*inputs), expected)


@pytest.mark.parametrize("batch", [3, 70])
@torch.no_grad()
def test_under_autocast(batch: int) -> None:
    expected, inputs = given(batch, 4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(recurrence(*inputs), expected)


@torch.no_grad()
def test_registration() -> None:
    for batch in (3, 70):
        inputs = tuple(each.detach() for each in given(batch, 5)[1])
        torch.library.opcheck(torch.ops.accel.recurrence.default, inputs)


def test_no_gradients() -> None:
    with pytest.raises(RuntimeError, match=r"accel.*recurrence"):
        recurrence(*given(3, 5)[1]).sum().backward()
