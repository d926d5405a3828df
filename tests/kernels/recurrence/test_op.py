"""The recurrence of a GRU without its inputs' part, against torch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accel.kernels.recurrence import cpu, recurrence, reference
from torch import Tensor, nn


def given(batch: int, length: int, width: int = 6) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What `nn.GRU` gives, and what comes to the same."""
    torch.manual_seed(0)
    gru = nn.GRU(4, width, batch_first=True)
    inputs, begin = torch.randn(batch, length, 4), torch.randn(1, batch, width)
    gates = nn.functional.linear(inputs, gru.weight_ih_l0, gru.bias_ih_l0)
    return gru(inputs, begin)[0], (gates, begin[0], gru.weight_hh_l0, gru.bias_hh_l0)


# Compiled up to a width of 128, with threads from 16 sequences on; in steps for 32 that are wider.
@pytest.mark.parametrize(
    ("batch", "length", "width"),
    [(1, 1, 1), (3, 5, 6), (1, 20, 65), (2, 0, 16), (100, 3, 64), (31, 2, 131), (32, 3, 131)],
)
@torch.no_grad()
def test_it_is_a_gru(batch: int, length: int, width: int) -> None:
    expected, inputs = given(batch, max(length, 1), width)
    if length == 0:
        expected, inputs = expected[:, :0], (inputs[0][:, :0], *inputs[1:])
    torch.testing.assert_close(recurrence(*inputs), expected)
    if length:
        torch.testing.assert_close(reference.recurrence(*inputs), expected)


@torch.no_grad()
def test_few_sequences_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, why = cpu.compiled()
    assert kernel is not None, why
    called = []

    def counted(*arguments: object) -> None:
        called.append(arguments)
        kernel(*arguments)

    monkeypatch.setattr(cpu, "compiled", lambda: (counted, ""))
    expected, inputs = given(3, 5)
    strided = inputs[0].repeat_interleave(2, -1)[..., ::2]  # not contiguous
    torch.testing.assert_close(cpu.recurrence(strided, *inputs[1:]), expected)
    assert len(called) == 1


@torch.no_grad()
def test_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(CppPythonBindingsCodeCache, "load_pybinding", refuse)
    cpu.compiled.cache_clear()
    try:
        assert cpu.compiled() == (None, "RuntimeError: no compiler here")
        assert "no compiler here" in caplog.text
        expected, inputs = given(3, 5)
        torch.testing.assert_close(cpu.recurrence(*inputs), expected)
    finally:
        cpu.compiled.cache_clear()


@pytest.mark.parametrize("type", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_other_types(type: torch.dtype) -> None:
    expected, inputs = given(3, 5)
    found = recurrence(*(each.to(type) for each in inputs))
    assert found.dtype is type
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("batch", "width"), [(3, 6), (32, 131)])
@torch.no_grad()
def test_under_autocast(batch: int, width: int) -> None:
    expected, inputs = given(batch, 4, width)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(recurrence(*inputs), expected)


@torch.no_grad()
def test_registration() -> None:
    for batch, width in (3, 6), (32, 131):
        inputs = tuple(each.detach() for each in given(batch, 5, width)[1])
        torch.library.opcheck(torch.ops.accel.recurrence.default, inputs)


def test_no_gradients() -> None:
    # By what it says, as the operator may be that of another copy of the package.
    with pytest.raises(ValueError, match="accel::recurrence has no gradients: call it under"):
        recurrence(*given(3, 5)[1])


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize(
    "change", [torch.Tensor.double, lambda each: each[..., :-1], lambda each: each[None]]
)
@torch.no_grad()
def test_inputs_that_do_not_fit(which: int, change: Callable[[Tensor], Tensor]) -> None:
    inputs = list(given(3, 5)[1])
    inputs[which] = change(inputs[which])
    with pytest.raises(ValueError, match="needed are"):
        recurrence(*inputs)
