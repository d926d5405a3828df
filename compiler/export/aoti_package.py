"""Engines as AOTInductor packages (`.pt2`)."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...kernels.errors import EngineError, ExportError, first_line
from ...passes import Feature
from .formats import Format
from .manifest import Manifest
from .program import machine
from .torch_archive import MANIFEST, device_of, manifest_in, records_of, seal_archive

__all__ = ["AotiPackage", "AotiRunner"]


@dataclass(frozen=True)
class AotiPackage(Format):
    """Machine code by AOTInductor, for this kind of machine and this version of torch.

    It calls accel's operators, which loading it brings. Load only what you trust.
    """

    suffix: ClassVar[str] = ".pt2"
    summary: ClassVar[str] = "compiled by AOTInductor for this machine"
    plain: ClassVar[bool] = False
    cannot: ClassVar[Mapping[Feature, str]] = {
        Feature.SHARED_SUBGRAPHS: "AOTInductor (torch 2.13) has no code for calls of shared "
        "subgraphs",
    }

    def write(self, program: torch.export.ExportedProgram, manifest: Manifest, path: Path) -> None:
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
        package.unlink()
        seal_archive(path)

    def read(self, path: Path) -> tuple[Manifest, AotiRunner]:
        manifest = manifest_in(records_of(path), path)
        _check_machine(path, manifest)
        try:
            loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
        except RuntimeError as error:
            raise EngineError(f"{path}: torch can't load it: {first_line(error)}") from error
        return manifest, AotiRunner(loader)


def _check_machine(path: Path, manifest: Manifest) -> None:
    built = {**manifest.machine, "torch": manifest.versions.get("torch", "")}
    here = {**machine(device_of(manifest, path)), "torch": torch.__version__}
    differ = [f"{key} {built.get(key)} (here {here[key]})" for key in here
              if built.get(key) != here[key]]  # fmt: skip
    if differ:
        raise EngineError(
            f"{path}: built for another machine: {', '.join(differ)}. Compiled code does not carry "
            "over; export it here, or in a format that holds none"
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
