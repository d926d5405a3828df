"""The seal of an engine file: a hash of all of it, at its very end.

Checked before anything in the file is read, so that a truncated or altered file is refused
without being parsed. It guards against damage, not against a forger: whoever can write the file
can also seal it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from ...kernels.errors import EngineError

__all__ = ["DIGEST", "check_seal", "seal"]

DIGEST = 64  # hexadecimal digits of SHA-256
_CHUNK = 2**20


def _hash(path: Path, size: int, beside: Sequence[Path]) -> str:
    """Of the first `size` bytes, and of the files beside it that exist."""
    digest = hashlib.sha256()
    parts = [(path, size), *((each, os.path.getsize(each)) for each in beside if each.is_file())]
    for part, left in parts:
        with part.open("rb") as file:
            while left > 0 and (chunk := file.read(min(left, _CHUNK))):
                digest.update(chunk)
                left -= len(chunk)
    return digest.hexdigest()


def seal(path: Path, head: bytes, beside: Sequence[Path] = ()) -> None:
    """Append `head` and the hash of all that stands before it.

    head: what makes the addition valid in the file's format. beside: other files that belong to
    the engine, where they exist; the hash covers them.
    """
    digest = _hash(path, os.path.getsize(path), beside)
    with path.open("ab") as file:
        file.write(head + digest.encode())


def check_seal(path: Path, head: bytes, beside: Sequence[Path] = ()) -> None:
    """Raise EngineError if the file is not one that `seal` has finished, or was changed since."""
    if not path.is_file():
        raise EngineError(f"{path}: no such file")
    body = os.path.getsize(path) - len(head) - DIGEST
    end = b""
    if body > 0:
        with path.open("rb") as file:
            file.seek(body)
            end = file.read()
    if not end.startswith(head):
        raise EngineError(
            f"{path}: not an engine of accel, or cut short: its seal is missing. Write it again "
            "with accel.export"
        )
    if end[len(head) :] != _hash(path, body, beside).encode():
        others = "".join(f" (with {each.name}, if there is one)" for each in beside)
        raise EngineError(
            f"{path}: the content{others} does not match its seal, so it was altered or damaged. "
            "Copy it again, or write it again with accel.export"
        )
