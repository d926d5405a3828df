"""Engines as AOTInductor packages (`.pt2`)."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...kernels.errors import EngineError, ExportError, first_line
from ...passes import Feature
from .manifest import Manifest
from .program import machine
from .seal import DIGEST, check_seal, seal

__all__ = ["AotiRunner", "files", "read", "versions", "write"]

MANIFEST = "accel_manifest.json"
# The package is a zip archive, which may end in a comment.
SEAL = b"accel.sha256="
PLAIN = False  # accel's operators stay, and loading needs accel
CANNOT = {
    Feature.SHARED_SUBGRAPHS: "AOTInductor (torch 2.13) has no code for calls of shared subgraphs",
}


def files(path: Path) -> list[Path]:
    """The files that an engine consists of."""
    return [path]


def versions() -> dict[str, str]:
    """Of the libraries that write the file, besides torch."""
    return {}


def write(program: torch.export.ExportedProgram, manifest: Manifest, path: Path) -> None:
    """Compile `program` and write it with its manifest."""
    from ..inductor import inductor_settings

    try:
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs=inductor_settings()
        )
    except Exception as error:  # whatever Inductor and the C++ compiler raise
        raise ExportError(
            f"AOTInductor can't compile the rewritten graph: {first_line(error)}"
        ) from error
    # Anew, without the C++ sources that the machine code was made from: nothing reads them.
    package = path.with_name(path.name + ".torch")
    path.rename(package)
    with zipfile.ZipFile(package) as source, zipfile.ZipFile(path, "w") as archive:
        root = source.namelist()[0].split("/")[0]
        for entry in source.infolist():
            if not entry.filename.endswith(".cpp"):
                with source.open(entry) as old, archive.open(entry, "w") as new:
                    shutil.copyfileobj(old, new)
        archive.writestr(f"{root}/extra/{MANIFEST}", manifest.write())
        archive.comment = b"?" * (len(SEAL) + DIGEST)
    package.unlink()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - len(SEAL) - DIGEST)
    seal(path, SEAL)


def read(path: Path) -> tuple[Manifest, AotiRunner]:
    """The manifest and a runner. Raises EngineError for a file that is not a sound engine."""
    check_seal(path, SEAL)
    try:
        with zipfile.ZipFile(path) as archive:
            inside = [name for name in archive.namelist() if name.endswith(f"/extra/{MANIFEST}")]
            text = archive.read(inside[0]).decode() if inside else None
    except (zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError) as error:
        raise EngineError(f"{path}: not a package of AOTInductor: {error}") from error
    if text is None:
        raise EngineError(f"{path}: a package without a manifest of accel")
    manifest = Manifest.read(text)
    _check_machine(path, manifest)
    try:
        loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
    except RuntimeError as error:
        raise EngineError(f"{path}: torch can't load it: {first_line(error)}") from error
    return manifest, AotiRunner(loader)


def _check_machine(path: Path, manifest: Manifest) -> None:
    built = {**manifest.machine, "torch": manifest.versions.get("torch", "")}
    device = torch.device(built.get("device", "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EngineError(f"{path}: built for a CUDA device; there is none here")
    here = {**machine(device), "torch": torch.__version__}
    differ = [f"{key} {built.get(key)} (here {here[key]})" for key in here
              if built.get(key) != here[key]]  # fmt: skip
    if differ:
        raise EngineError(
            f"{path}: built for another machine: {', '.join(differ)}. Compiled code does not carry "
            "over; export it here, or use an .onnx engine"
        )


class AotiRunner:
    """Calls a loaded package."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.providers = ["AOTInductor"]

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        # Compiled code takes its inputs for contiguous without looking.
        results: Sequence[Tensor] = self.loader.boxed_run([each.contiguous() for each in tensors])
        return results
