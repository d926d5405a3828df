"""What the formats have in common that torch writes and runs: a zip archive with a manifest.

An archive may end in a comment, which is where the seal is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...kernels.errors import EngineError, first_line
from .manifest import Manifest
from .seal import DIGEST, check_seal, seal

__all__ = ["MANIFEST", "device_of", "manifest_in", "records_of", "seal_archive"]

MANIFEST = "accel_manifest.json"
_SEAL = b"accel.sha256="


def seal_archive(path: Path) -> None:
    """Seal an archive that has no comment yet."""
    with path.open("r+b") as file:
        file.seek(-2, 2)  # an archive ends in its comment, with the length before it
        file.write((len(_SEAL) + DIGEST).to_bytes(2, "little"))
    seal(path, _SEAL)


def records_of(path: Path) -> Any:
    """Torch's reader of a sealed archive. Raises EngineError for any other file."""
    check_seal(path, _SEAL)
    try:
        return torch._C.PyTorchFileReader(str(path))
    except RuntimeError as error:
        raise EngineError(f"{path}: not an archive of torch: {first_line(error)}") from error


def manifest_in(records: Any, path: Path) -> Manifest:
    """The manifest that is among the records. Raises EngineError where there is none."""
    name = f"extra/{MANIFEST}"
    if not records.has_record(name):
        raise EngineError(f"{path}: an archive of torch without a manifest of accel")
    try:
        return Manifest.read(records.get_record(name).decode())
    except UnicodeDecodeError as error:
        raise EngineError(f"{path}: the manifest is no text: {error}") from error


def device_of(manifest: Manifest, path: Path) -> torch.device:
    """The device that the engine was made for. Raises EngineError where there is none here."""
    device = torch.device(manifest.machine.get("device", "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EngineError(f"{path}: built for a CUDA device; there is none here")
    return device
