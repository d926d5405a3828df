"""What a call says of itself; odd calls are read, too, and prove nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accel.compiler.runtime.kept import Weights
from accel.compiler.runtime.reading import Hashes, Reader
from accel.passes.pade.clock import Clock
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

# Two samples, a condition, a time.
CLOCK = Clock(times=(3,), latents=(0, 1), answers=(0, 1), conditions=(2,))


def inputs(*samples: Tensor, condition: Any = None) -> list[Any]:
    prompt = torch.tensor([1, 2]) if condition is None else condition
    return [*samples, prompt, torch.tensor([5.0, 5.0])]


@pytest.mark.parametrize(
    "samples",
    [(torch.randn(2, 3), torch.randn(3, 3)), (torch.randn(()), torch.randn(()))],
    ids=["other batches", "numbers"],
)
def test_samples_without_a_batch_in_common_prove_nothing(samples: tuple[Tensor, Tensor]) -> None:
    reader, given = Reader(CLOCK), inputs(*samples)
    (one, _), (other, _) = (reader.read(Hashes(), given, []) for _ in range(2))
    assert reader.blind(given)
    assert one.keys != other.keys
    assert len(reader.call(given, one).samples) == 1
    assert reader.glimpse(given, samples).answers == []


def test_outputs_of_another_form_prove_nothing() -> None:
    reader, given = Reader(CLOCK), inputs(torch.randn(2, 3), torch.randn(2, 3))
    assert not reader.blind(given)  # which is not known before the first call
    assert reader.glimpse(given, [torch.randn(2, 3), torch.randn(2, 3, 1)]).values == []
    assert reader.blind(given)


def test_what_is_looked_at_is_in_sample_and_output_alike() -> None:
    """An output with more channels (a learnt variance), an input with more (a picture)."""
    reader, wide, narrow = Reader(CLOCK), torch.randn(2, 6, 5), torch.randn(2, 4, 5)
    found = reader.glimpse(inputs(wide, narrow), [wide[:, :4], torch.cat([narrow] * 2, 1)])
    for values, answers in zip(found.values, found.answers, strict=True):
        assert torch.equal(values, answers)
    assert found.box == ((4, 5), (4, 5), 20)
    assert reader.glimpse(inputs(wide, narrow), [wide, narrow]).values == []  # by now another size


def test_conditions_are_told_by_rows_where_they_have_the_batch() -> None:
    reader, samples = Reader(CLOCK), (torch.randn(2, 3), torch.randn(2, 3))
    seen, waited = reader.read(Hashes(), inputs(*samples), [])
    assert not waited
    assert [len(each) for each in seen.conditions] == [2]
    whole, _ = reader.read(Hashes(), inputs(*samples, condition=torch.ones(3)), [])
    number, _ = reader.read(Hashes(), inputs(*samples, condition=0.5), [])
    assert [len(each) for each in (*whole.conditions, *number.conditions)] == [1, 1]
    call = reader.call(inputs(*samples), seen)
    assert call.conditions[0][0] != call.conditions[1][0]
    assert call.conditions[0][1:] == (5.0,)


def test_large_tensors_are_read_again_when_torch_counts_a_change() -> None:
    hashes, large, small = Hashes(), torch.zeros(2**15), torch.zeros(4)
    for tensor, remembered in ((large, True), (small, False)):
        hashes.put(tensor, [b"hash"])
        assert (hashes.get(tensor) is not None) == remembered
    large.add_(1)
    assert hashes.get(large) is None


def test_weights_that_wrap_others_are_told_by_their_count() -> None:
    weight = TwoTensor(torch.ones(3), torch.zeros(3))
    weights = Weights([weight])
    assert weights.bits is None
    assert not weights.changed([weight])
    weight.add_(1)
    assert weights.changed([weight])
