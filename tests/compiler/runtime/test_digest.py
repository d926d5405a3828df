"""Hashes of all bits, and one reading of a device."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from accel.compiler.runtime.digest import (
    Later,
    digest,
    digests,
    mixed,
    on_host,
    packed,
    parts_of,
)

DTYPES = (torch.bool, torch.bfloat16, torch.float16, torch.int8, torch.complex64, torch.int64)


def test_digest_sees_values_order_type_and_shape() -> None:
    x = torch.arange(12.0)
    assert digest(x) == digest(x.clone()) == digest(torch.arange(24.0)[::2] / 2)
    others = [x.flip(0), x + 1e-6, x.double(), x.view(3, 4), x.view(4, 3), x[:-1], -x]
    assert len({digest(each) for each in (x, *others)}) == 1 + len(others)
    for dtype in DTYPES:
        ones = torch.ones(3, dtype=dtype)
        assert digest(ones) == digest(ones.clone()) != digest(torch.zeros(3, dtype=dtype))
    assert digest(torch.ones(())) != digest(torch.ones(1))
    assert digest(torch.zeros(0)) == digest(torch.zeros(0)) != digest(torch.zeros(0, 1))


def test_rows_are_told_apart() -> None:
    x = torch.tensor([[1, 2], [2, 1], [1, 2]])
    first, second, third = digests(x)
    assert first == third != second
    assert digests(torch.zeros(0, 3)) == []


def devices_bits(tensor: torch.Tensor) -> tuple[int, int]:
    """What another device would make of a tensor."""
    one, other = mixed(parts_of(tensor[None]))[0].tolist()
    return one, other


@pytest.mark.parametrize("hashed", [digest, devices_bits], ids=["cpu", "device"])
def test_no_two_of_many_small_conditions_collide(hashed: Callable[[torch.Tensor], object]) -> None:
    """A linear hash made one of [1, 2] and [4, 1]: sums of bits times odd numbers."""
    labels = [torch.tensor(each) for each in itertools.product(range(24), repeat=2)]
    masks = [torch.tensor(each) for each in itertools.product([False, True], repeat=10)]
    hot = [torch.nn.functional.one_hot(each, 24).float() for each in labels]
    for kind in (labels, masks, hot):
        assert len({hashed(each) for each in kind}) == len(kind)


def test_every_bit_counts_on_a_device() -> None:
    x = torch.randint(-(2**31), 2**31, (37,), dtype=torch.int32)
    seen = {devices_bits(x)}
    for place in range(37):
        for bit in range(32):
            changed = x.clone()
            changed[place] ^= -(2**31) if bit == 31 else 1 << bit
            seen.add(devices_bits(changed))
    assert len(seen) == 1 + 37 * 32
    lanes = torch.tensor(sorted(seen))
    assert lanes[:, 0].unique().numel() == lanes[:, 1].unique().numel() == len(seen)
    # Half of all bits differ between any two, in each lane.
    differing = [bin((int(a) ^ int(b)) & (2**64 - 1)).count("1") for a, b in lanes[:200]]
    assert 30 < sum(differing) / len(differing) < 34


def test_what_is_on_the_cpu_is_handed_on() -> None:
    given = [torch.randn(3), torch.ones(2, dtype=torch.bool)]
    assert all(one is other for one, other in zip(on_host(given), given, strict=True))


def test_what_is_read_at_once_is_taken_apart_again() -> None:
    given = [torch.randn(3, 2), torch.tensor(5), torch.ones(3, dtype=torch.bool), torch.zeros(0),
             torch.randn(4, dtype=torch.float64).bfloat16()]  # fmt: skip
    together, apart = packed(given)
    assert together.dtype is torch.uint8
    for one, other in zip(apart(together.clone()), given, strict=True):
        assert one.dtype is other.dtype
        assert torch.equal(one, other)


class Pretended:
    """An event of a device that is not there."""

    over = False

    def query(self) -> bool:
        return self.over


def test_copies_are_ready_when_all_devices_are() -> None:
    later = Later([torch.arange(3)])
    assert later.ready()
    assert torch.equal(later.copies[0], torch.arange(3))
    first, second = Pretended(), Pretended()
    later.done = [first, second]
    for each in (first, second):
        assert not later.ready()
        each.over = True
    assert later.ready()
