"""Whether tensors still hold what they held: what torch counts, and the bits themselves."""

from __future__ import annotations

import ctypes
import hashlib
import math
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, compress
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

__all__ = ["Fingerprint", "digests"]

DIGESTED = 1024  # elements of each tensor in its digest
SAMPLES = 16  # spots of each tensor that are compared at every call
PIECE, EVERY = 32 * 1024, 8  # bytes that are compared, all of them, in turn; at which calls
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
FORMATS: dict[int, Any] = {1: "B", 2: "H", 4: "I", 8: "Q"}

_version = attrgetter("_version")


class Fingerprint:
    """What tensors hold, taken down so that a later call can tell whether they have changed.

    Noticed at once: other memory, a change that torch counts, and on a CPU one that reaches any of
    the spots, which are spread evenly over each tensor: a sixteenth in one piece always does. The
    rest, too, is noticed on a CPU, to the bit, but later: one call in EVERY compares the next PIECE
    bytes. On other devices the spots alone are, and without waiting: what a comparison found is
    read at a later call.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # Of a tensor made in inference mode torch counts no changes, and says so by an error.
        self.counted = [not each.is_inference() for each in tensors]
        self.signs = self._signs(tensors)
        filled = [each for each in tensors if each.numel()]
        memories = [_Memory(each) for each in filled if each.device.type == "cpu"]
        self.samples = [each.sample for each in memories]
        self.sampled = [each.tobytes() for each in self.samples]
        self.memories = [each.all for each in memories]
        counts = [len(range(0, len(each), PIECE)) for each in self.memories]
        self.firsts = list(accumulate(counts, initial=0))  # each memory's first piece
        self.hashes = array("q", map(self._hash, range(self.firsts[-1])))
        self.calls = 0
        devices = {each.device for each in filled if each.device.type != "cpu"}
        self.elsewhere = [
            _OnDevice([each for each in filled if each.device == device]) for device in devices
        ]

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> Fingerprint | None:
        """None where one of them has no memory of its own: it wraps others, or is sparse."""
        try:
            addresses = [each.data_ptr() for each in tensors]
        except RuntimeError:
            return None
        if not all(each or not one.numel() for each, one in zip(addresses, tensors, strict=True)):
            return None
        return Fingerprint(tensors)

    def changed(self, tensors: Sequence[Tensor]) -> bool:
        """Whether they are found to have changed. tensors: those that it was made of, in order."""
        return (
            self._signs(tensors) != self.signs  # first: memory is read only where it still is
            or list(map(memoryview.tobytes, self.samples)) != self.sampled
            or self._piece_changed()
            or any(each.changed() for each in self.elsewhere)
        )

    def _signs(self, tensors: Sequence[Tensor]) -> tuple[list[int], list[int]]:
        # Some 15 tensors at every call of less than a millisecond: loops in C.
        versions = list(map(_version, compress(tensors, self.counted)))
        return list(map(Tensor.data_ptr, tensors)), versions

    def _hash(self, piece: int) -> int:
        which = bisect_right(self.firsts, piece) - 1
        start = (piece - self.firsts[which]) * PIECE
        return hash(self.memories[which][start : start + PIECE].tobytes())

    def _piece_changed(self) -> bool:
        self.calls = calls = self.calls + 1
        if calls % EVERY or not self.hashes:
            return False
        piece = calls // EVERY % len(self.hashes)
        return self._hash(piece) != self.hashes[piece]


def digests(tensors: Sequence[Tensor]) -> list[str]:
    """16 hexadecimal digits of each tensor's sizes, type and some of its elements, spread evenly
    over all. The same in every process; waits for their devices."""
    return [hashlib.blake2b(_excerpt(each.detach()), digest_size=8).hexdigest() for each in tensors]


def _excerpt(tensor: Tensor) -> bytes:
    said = f"{list(tensor.shape)} {tensor.dtype} ".encode()
    wrapped: Any = tensor
    if hasattr(wrapped, "__tensor_flatten__"):  # such as quantised ones
        names, _ = wrapped.__tensor_flatten__()
        return said + b"".join(_excerpt(getattr(wrapped, name)) for name in names)
    flat = tensor.flatten()
    chosen = flat[:: max(len(flat) // DIGESTED, 1)].cpu().contiguous()
    return said + ctypes.string_at(chosen.data_ptr(), chosen.nbytes)


class _Memory:
    """Where a tensor on the CPU lies, in bytes, and spots of it. Holds no reference to it: to be
    read only while the tensor is known to be there. What lies between its elements counts, too."""

    def __init__(self, tensor: Tensor) -> None:
        size = _span(tensor) * tensor.element_size()
        self.all = memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr())).cast("B")
        words = self.all.cast(FORMATS[min(tensor.element_size(), 8)])
        self.sample = words[:: _stride(len(words))]


class _OnDevice:
    """Spots of tensors on one device other than the CPU, which nothing here waits for."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.samples = [_spots(each) for each in tensors]
        self.sampled = torch.cat(self.samples)
        self.done = torch.Event(tensors[0].device)
        self.differs: Tensor | None = None  # on the host; to be read once `done`

    def changed(self) -> bool:
        """Whether an earlier comparison found a change; starts the next one if that is done."""
        if self.sampled.is_cuda and torch.cuda.is_current_stream_capturing():
            return False  # events can't be asked then
        if self.differs is not None:
            if not self.done.query():
                return False
            if self.differs:
                return True
        differs = (torch.cat(self.samples) != self.sampled).any()
        self.differs = differs.to("cpu", non_blocking=True)
        self.done.record(torch.accelerator.current_stream(differs.device))
        return False


def _spots(tensor: Tensor) -> Tensor:
    """A view of some of a tensor's elements, as whole numbers with the same bits."""
    size = min(tensor.element_size(), 8)
    parts = tensor.element_size() // size
    count, offset = _span(tensor) * parts, tensor.storage_offset() * parts
    stride = _stride(count)
    view = torch.empty(0, dtype=INTEGERS[size], device=tensor.device)
    return view.set_(tensor.untyped_storage(), offset, (-(-count // stride),), (stride,))


def _span(tensor: Tensor) -> int:
    """Elements from the first to the last in memory; those of others in between are among them."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in pairs)


def _stride(count: int) -> int:
    """Between spots; no divisor with the number of elements, so that every column has its turn."""
    stride = max(count // SAMPLES, 1)
    while math.gcd(stride, count) > 1:
        stride += 1
    return stride
