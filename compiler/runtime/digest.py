"""Hashes of all bits of tensors, and reading all that is wanted of a device at once."""

from __future__ import annotations

import ctypes
import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = [
    "Later",
    "at_hand",
    "digest",
    "digests",
    "mixed",
    "named",
    "on_host",
    "packed",
    "parts_of",
]

# Of splitmix64, a well-known mixing function; as signed numbers, as torch has no others.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def digest(tensor: Tensor) -> bytes:
    """A 128-bit hash of a tensor's bits, in their order, with its type and shape.

    On the CPU it is BLAKE2. On other devices, which it waits for, it is a mix of its own.
    """
    (found,) = digests(tensor.detach()[None])
    return found


def digests(tensor: Tensor) -> list[bytes]:
    """The hashes of a tensor's rows, one for each index of its first dimension."""
    return named(tensor, on_host([parts_of(tensor)])[0])


def named(tensor: Tensor, parts: Tensor) -> list[bytes]:
    """Hashes of a tensor's rows from their `parts_of`, which were read from the device by now."""
    form = f"{tensor.dtype} {list(tensor.shape[1:])} ".encode()
    if parts.dtype is torch.int64:
        size = parts[0].nbytes if len(parts) else 0
        data = bytes(_memory(parts))
        return [form + data[size * row : size * (row + 1)] for row in range(len(parts))]
    memory = _memory(parts)
    size = len(memory) // max(len(parts), 1)
    return [
        form + hashlib.blake2b(memory[size * row : size * (row + 1)], digest_size=16).digest()
        for row in range(len(parts))
    ]


def parts_of(tensor: Tensor) -> Tensor:
    """What a tensor's hashes are made of: on the CPU its bytes, [rows, bytes] as uint8; on another
    device, which is not waited for, two mixed words a row, [rows, 2] as int64."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous()
    flat = flat.reshape(len(flat), math.prod(flat.shape[1:]))
    if flat.is_complex():
        flat = torch.view_as_real(flat).flatten(1)
    if flat.dtype == torch.bool:
        flat = flat.to(torch.uint8)
    flat = flat.view(torch.uint8)
    return flat if flat.device.type == "cpu" else mixed(flat)


def mixed(flat: Tensor) -> Tensor:
    """Two mixed words of each row of bytes, uint8 [rows, bytes]: int64 [rows, 2]."""
    padded = torch.nn.functional.pad(flat, (0, -flat.shape[1] % 8))
    words = padded.contiguous().view(torch.int64)
    place = torch.arange(1, words.shape[1] + 1, device=flat.device)
    lanes = []
    for lane in (1, 2):
        # Each word is mixed with its place before it is added up, so that order counts, and no
        # change of two words cancels out but by chance.
        keyed = _mix(words + _mix(place * (2 * lane + 1) * _STEP))
        lanes.append(_mix(keyed.sum(1) + flat.shape[1]))
    return torch.stack(lanes, 1)


def _mix(words: Tensor) -> Tensor:
    words = (words ^ _shifted(words, 30)) * _FIRST
    words = (words ^ _shifted(words, 27)) * _SECOND
    return words ^ _shifted(words, 31)


def _shifted(words: Tensor, bits: int) -> Tensor:
    """To the right, with zeros coming in; torch repeats the sign."""
    return (words >> bits) & (2 ** (64 - bits) - 1)


def _memory(tensor: Tensor) -> memoryview:
    """A contiguous tensor's bytes; to be read while the tensor is there."""
    if not tensor.numel():
        return memoryview(b"")
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr())).cast("B")


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors on the CPU; of each other device all are read at once, waiting for it once."""
    found = list(tensors)
    for device in {each.device for each in tensors if each.device.type != "cpu"}:
        places = [index for index, each in enumerate(tensors) if each.device == device]
        together, apart = packed([tensors[index] for index in places])
        for index, values in zip(places, apart(together.cpu()), strict=True):
            found[index] = values
    return found


def at_hand(tensors: Sequence[Tensor]) -> bool:
    """Whether all of them are on the CPU."""
    return all(each.device.type == "cpu" for each in tensors)


class Later:
    """Copies of tensors on the CPU that nothing waits for; to be read once they are `ready`."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.copies = [each.detach().to("cpu", non_blocking=True) for each in tensors]
        self.done = []
        for device in {each.device for each in tensors if each.device.type != "cpu"}:
            event = torch.Event(device)
            event.record(torch.accelerator.current_stream(device))
            self.done.append(event)

    def ready(self) -> bool:
        """Whether the devices have come to all of them."""
        return all(event.query() for event in self.done)


def packed(tensors: Sequence[Tensor]) -> tuple[Tensor, Callable[[Tensor], list[Tensor]]]:
    """The bytes of all tensors in one, and what takes a copy of it apart again."""
    flat = [each.detach().contiguous().flatten().view(torch.uint8) for each in tensors]
    # Pieces begin at multiples of 16 bytes, so that each can be viewed as its type again.
    padded = [torch.nn.functional.pad(each, (0, -len(each) % 16)) for each in flat]

    def apart(together: Tensor) -> list[Tensor]:
        pieces = together.split([len(each) for each in padded])
        return [
            piece[: len(bits)].view(each.dtype).view(each.shape)
            for piece, bits, each in zip(pieces, flat, tensors, strict=True)
        ]

    return torch.cat(padded), apart
