"""What of a change to a tensor's memory is noticed, and when."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from accel.compiler.runtime import fingerprint
from accel.compiler.runtime.fingerprint import EVERY, PIECE, SAMPLES, Fingerprint
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

TYPES = [torch.float32, torch.bfloat16, torch.float64, torch.complex128, torch.int8, torch.bool]


def calls_until_noticed(tensors: list[Tensor], change: Any, most: int = 100) -> int:
    found = Fingerprint(tensors)
    assert not any(found.changed(tensors) for _ in range(most)), "changed by itself"
    with torch.no_grad():
        change()
    return next(call for call in range(1, most + 1) if found.changed(tensors))


@pytest.mark.parametrize("dtype", TYPES)
def test_bits_of_every_type(dtype: torch.dtype) -> None:
    tensor = torch.zeros(1000).to(dtype)
    assert calls_until_noticed([tensor], lambda: tensor.data.fill_(1)) == 1
    assert calls_until_noticed([tensor], lambda: tensor.data.logical_not_()) == 1


def test_a_sign_of_zero_and_no_number() -> None:
    """Bits are compared: zeros that differ differ, and what is no number equals itself."""
    tensor = torch.tensor([0.0, float("nan")])
    assert calls_until_noticed([tensor], lambda: tensor.data[0].neg_()) == 1


@pytest.mark.parametrize("width", [1, 7, 32, 48])
def test_a_sixteenth_or_a_column_is_noticed_at_once(width: int) -> None:
    for rows in (50, 512, 3000):
        table = torch.randn(rows, width)
        count = table.numel()
        run = 2 * -(-count // SAMPLES) if count < 1000 else -(-count // SAMPLES) + 8
        for start in torch.randint(0, count - run, (20,)).tolist():
            part = table.view(-1)[start : start + run]
            assert calls_until_noticed([table], partial(part.data.add_, 1), 1) == 1
    if width <= SAMPLES:
        assert calls_until_noticed([table], lambda: table.data[:, -1].add_(1), 1) == 1


def test_one_bit_anywhere_is_noticed_in_time() -> None:
    """After so many calls for each piece of each tensor at the latest."""
    tensors = [torch.randn(3, 5), torch.empty(0), torch.randn(PIECE), torch.randn(1)]
    pieces = sum(-(-each.numel() * 4 // PIECE) for each in tensors)
    late = 0
    for place in (1, 2047, PIECE - 1, *torch.randint(0, PIECE, (10,)).tolist()):
        bits = tensors[2].numpy().view("uint32")

        def flip(bits: Any = bits, place: int = place) -> None:
            bits[place] ^= 1

        calls = calls_until_noticed(tensors, flip)
        assert calls <= EVERY * pieces
        late += calls > 1
    assert late


def test_what_torch_counts_is_noticed_at_once() -> None:
    table = nn.Parameter(torch.randn(1000, 32))
    assert calls_until_noticed([table], lambda: table[500].add_(1)) == 1
    assert calls_until_noticed([table], lambda: table.detach()[501].add_(1)) == 1


def test_other_memory_is_noticed_at_once() -> None:
    table = nn.Parameter(torch.randn(1000, 32))

    def move() -> None:
        table.data = table.data.clone()

    assert calls_until_noticed([table], move) == 1


def test_memory_that_is_given_back_is_not_read() -> None:
    """As sharded training does between steps."""
    table = torch.randn(1 << 20)
    assert calls_until_noticed([table], lambda: table.untyped_storage().resize_(0), 2) == 1


def test_tensors_made_in_inference_mode() -> None:
    with torch.inference_mode():
        table = torch.randn(1000, 32)

    def scale() -> None:
        with torch.inference_mode():
            table.mul_(2)

    assert calls_until_noticed([table], scale) == 1


@pytest.mark.parametrize(
    "view", [lambda x: x.t(), lambda x: x[1:, ::2], lambda x: x[:, :1].expand(-1, 4)]
)
def test_layouts(view: Any) -> None:
    whole = torch.randn(40, 30)
    assert calls_until_noticed([view(whole)], lambda: whole.data.add_(1)) == 1


def test_tensors_without_memory_of_their_own() -> None:
    for each in (TwoTensor(torch.randn(3), torch.randn(3)), torch.eye(3).to_sparse()):
        assert Fingerprint.of([torch.randn(3), each]) is None
    assert Fingerprint.of([torch.randn(3), torch.empty(0)]) is not None


class Event:
    """Of a device that is slow."""

    ready = False

    def __init__(self, device: torch.device) -> None: ...
    def record(self, stream: None) -> None: ...
    def query(self) -> bool:
        return self.ready


def test_elsewhere_nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared on a device is read once it is there: logic alone, on the CPU."""
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: None)
    tensors = [torch.randn(100, 3), torch.randn(7).bfloat16(), torch.randn(6, 2).to(torch.cfloat)]
    found = fingerprint._OnDevice([*tensors, torch.randn(8, 8)[2:, ::2]])
    Event.ready = True
    assert not any(found.changed() for _ in range(5))
    Event.ready = False
    tensors[1].data.mul_(2)
    assert not any(found.changed() for _ in range(5))
    Event.ready = True
    # What was under way began before the change.
    assert [found.changed(), found.changed()] == [False, True]
