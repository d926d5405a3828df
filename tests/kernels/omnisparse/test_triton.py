"""The Triton kernels, run by Triton's interpreter, against the float64 reference.

The interpreter is slow: as few programs as show a thing. What a GPU would need is in
test_resources.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from accel.kernels.omnisparse import gpu, reference
from accel.kernels.omnisparse.selection import EXACT, Choice
from torch import Tensor

from ...triton_interpreter import as_on_a_gpu
from .test_op import WINDOW, expected, inputs, random_selection, relative, some_padding


def errors(
    shape: tuple[int, int, int, int, int],
    *,
    dtype: torch.dtype = torch.float32,
    is_causal: bool = True,
    padded: bool = False,
    active: float = 0.2,
) -> list[float]:
    """Relative errors of result, log-sum-exp and the gradients of query, key and value."""
    heads, groups, queries, keys, width = shape
    tensors = inputs(heads, groups, queries, keys, width, dtype, batch=3 if padded else 1)
    query, key, value = (each.detach() for each in tensors)
    valid = some_padding(len(key), keys) if padded else None
    chosen, budget = random_selection(groups, keys, is_causal, valid, len(key))
    scale, gradient = 1 / math.sqrt(width), torch.randn_like(query)
    where = chosen, budget, valid, None, is_causal, scale
    output, total, active_ones = gpu.forward(
        query, key, value, *where, active, WINDOW, 0, -1, tail=1
    )
    gradients = gpu.backward(
        gradient, query, key, value, output, total, chosen, budget, active_ones, valid, is_causal,
        scale, WINDOW,
    )  # fmt: skip
    allowed = reference.visible(chosen, budget, active_ones, valid, is_causal, WINDOW)
    wanted = expected(tensors, allowed, scale, gradient)
    got: list[Tensor] = [output, total, *gradients]
    return [relative(one, other) for one, other in zip(got, wanted, strict=True)]


@pytest.mark.parametrize(
    ("shape", "is_causal", "padded"),
    [
        ((1, 1, 1, 1, 32), True, False), ((1, 1, 1, 1, 32), False, True),
        ((4, 2, 63, 63, 64), True, True), ((4, 2, 63, 63, 64), False, False),
        ((8, 1, 65, 65, 32), True, False), ((1, 1, 1000, 1000, 32), True, False),
        ((2, 1, 1, 700, 256), False, False), ((1, 1, 129, 513, 48), True, True),
        ((1, 1, 130, 300, 128), False, True),
    ],
)  # fmt: skip
def test_values_and_gradients(
    shape: tuple[int, int, int, int, int], is_causal: bool, padded: bool
) -> None:
    assert max(errors(shape, is_causal=is_causal, padded=padded)) < 1e-5


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 3e-3), (torch.float16, 1e-3)])
def test_low_precision(dtype: torch.dtype, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are in float32; rounding a result to bfloat16 is an error of 1.7e-3 by itself."""
    as_on_a_gpu(monkeypatch)
    assert max(errors((2, 1, 300, 300, 64), dtype=dtype)) < limit


def test_in_order_and_at_once_are_equal() -> None:
    """The deterministic way of adding up keys that two segments share, and the other."""
    chosen, budget = random_selection(1, 520, True, None, 1)
    one, other = (set(chosen[0, 0, s, : budget[0, s]].tolist()) for s in (1, 2))
    assert one & other
    torch.use_deterministic_algorithms(True)
    try:
        assert max(errors((1, 1, 520, 520, 16), active=0.0)) < 1e-5
    finally:
        torch.use_deterministic_algorithms(False)
    assert max(errors((1, 1, 520, 520, 16), active=0.0)) < 1e-5


@pytest.mark.parametrize(
    ("shape", "is_causal", "padded"),
    [
        ((4, 2, 900, 900, 32), True, True), ((2, 1, 700, 700, 48), False, True),
        ((2, 2, 300, 1000, 16), True, False), ((1, 1, 1, 1, 16), True, False),
    ],
)  # fmt: skip
def test_shares_of_attention(
    shape: tuple[int, int, int, int, int], is_causal: bool, padded: bool
) -> None:
    """Those of the probes, without writing their scores; and the selection that follows."""
    heads, groups, queries, keys, width = shape
    tensors = inputs(heads, groups, queries, keys, width, torch.float32, batch=2 if padded else 1)
    query, key, _ = (each.detach() for each in tensors)
    valid = some_padding(3, keys)[:2] if padded else None
    rows, scale = reference.probe_rows(query, key), 1 / math.sqrt(width)
    got = gpu.probe_shares(query, key, valid, rows, is_causal, scale)
    exact = [each.double() for each in (query, key)]
    wanted = reference.probe_shares(*exact, valid, rows, is_causal, scale)
    torch.testing.assert_close(got, wanted.float(), rtol=1e-4, atol=1e-7)
    choice = Choice(recall=0.3, window=16, active=0.0)
    chosen = gpu.select(query, key, valid, is_causal, scale, choice)
    other = reference.omnisparse_select(query, key, valid, is_causal, scale, *choice.selecting())
    assert (chosen[1] != EXACT).any() == (keys > 1)
    assert (chosen[1] - other[1]).abs().max() <= 1  # what is a rounding away from the recall
    torch.testing.assert_close(chosen[2], other[2], rtol=0, atol=1e-2)


def test_shares_of_keys_with_nan() -> None:
    query, key = torch.randn(2, 1, 1, 600, 16).unbind(0)
    key[0, 0, 3] = torch.nan
    _, budget, *_ = gpu.select(query, key, None, True, 0.25, Choice(recall=0.5, active=0.0))
    assert (budget == EXACT).all()
    assert (gpu.select(query, query, None, True, 0.25, Choice(recall=1.0))[1] == EXACT).all()
