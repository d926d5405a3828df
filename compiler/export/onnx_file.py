"""Engines as ONNX files, run by onnxruntime."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...kernels.errors import EngineError, ExportError, first_line
from ...passes import Feature
from ..extras import optional
from .formats import Format
from .manifest import Manifest
from .seal import check_seal, seal

__all__ = ["OnnxFile", "OnnxRunner", "convert"]

MANIFEST = "accel.manifest"
# A last entry of `metadata_props` (field 14): key "accel.sha256", value 64 characters. Fields of a
# protobuf message may stand in any order, and a repeated one may be continued at the end.
SEAL = b"\x72\x50\x0a\x0caccel.sha256\x12\x40"
LARGEST = 2**31 - 2**20  # bytes that fit in one protobuf file, with room for what is no weight

# Element types as ONNX numbers them (onnx.TensorProto.DataType).
ELEMENT_TYPES = {
    torch.float32: 1, torch.uint8: 2, torch.int8: 3, torch.int16: 5, torch.int32: 6,
    torch.int64: 7, torch.bool: 9, torch.float16: 10, torch.float64: 11, torch.bfloat16: 16,
}  # fmt: skip


@dataclass(frozen=True)
class OnnxFile(Format):
    """ONNX, for onnxruntime wherever it runs; needs the extra `onnx`. The file holds no code.

    providers: onnxruntime's execution providers in order of preference; by default all that it
    has. Weights beyond `LARGEST` bytes go to a file of their own beside it (`<path>.data`).
    """

    suffix: ClassVar[str] = ".onnx"
    summary: ClassVar[str] = "run by onnxruntime"
    cannot: ClassVar[Mapping[Feature, str]] = {
        Feature.SHARED_SUBGRAPHS: "torch.onnx.export writes a shared subgraph out at every call",
    }

    providers: Sequence[str] | None = None

    def files(self, path: Path) -> list[Path]:
        return [path, path.with_name(path.name + ".data")]

    def versions(self) -> dict[str, str]:
        return {name: str(optional(name, "onnx").__version__) for name in ("onnx", "onnxscript")}

    def write(self, program: torch.export.ExportedProgram, manifest: Manifest, path: Path) -> None:
        inputs = [spec.name for spec in manifest.graph_inputs]
        convert(program, inputs, [spec.name for spec in manifest.graph_outputs], manifest, path)
        seal(path, SEAL, self.files(path)[1:])

    def read(self, path: Path) -> tuple[Manifest, OnnxRunner]:
        check_seal(path, SEAL, self.files(path)[1:])
        runtime = optional("onnxruntime", "onnx")
        providers = self.providers
        if providers is None:  # all but the one that calls a remote service
            providers = [p for p in runtime.get_available_providers() if not p.startswith("Azure")]
        try:
            session = runtime.InferenceSession(str(path), providers=list(providers))
        except Exception as error:  # onnxruntime's errors share no class
            raise EngineError(f"{path}: onnxruntime can't load it: {first_line(error)}") from error
        text = session.get_modelmeta().custom_metadata_map.get(MANIFEST)
        if text is None:
            raise EngineError(f"{path}: an ONNX file without a manifest of accel")
        manifest = Manifest.read(text)
        runner = OnnxRunner(session)
        for kind, specs, names in (
            ("inputs", manifest.graph_inputs, runner.inputs),
            ("outputs", manifest.graph_outputs, runner.outputs),
        ):
            if [spec.name for spec in specs] != names:
                raise EngineError(
                    f"{path}: the graph's {kind} are {names}, not those of its manifest"
                )
        return manifest, runner


def convert(
    program: torch.export.ExportedProgram,
    inputs: Sequence[str],
    outputs: Sequence[str],
    manifest: Manifest,
    path: Path,
) -> None:
    """Write `program` as a checked ONNX file without a seal; inputs, outputs: their names."""
    try:
        with _quiet():
            converted: Any = torch.onnx.export(
                program,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(
            f"torch.onnx.export can't express the rewritten graph: {first_line(_root(error))}"
        ) from error
    # Stack traces of every node: half of a small file, and paths of the machine that wrote it.
    optional("onnx_ir.passes.common", "onnx").ClearMetadataAndDocStringPass()(converted.model)
    converted.model.metadata_props[MANIFEST] = manifest.write()
    weights = sum(tensor.nbytes for tensor in program.state_dict.values())
    converted.save(str(path), external_data=weights > LARGEST)
    try:
        optional("onnx", "onnx").checker.check_model(str(path), full_check=True)
    except Exception as error:  # onnx's errors share no class
        raise ExportError(f"the ONNX file is not sound: {first_line(error)}") from error


def _root(error: BaseException) -> BaseException:
    """What was raised first; the exporter wraps it in advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that are not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class OnnxRunner:
    """Calls an onnxruntime session on torch tensors without copying them."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.inputs: list[str] = [each.name for each in session.get_inputs()]
        self.outputs: list[str] = [each.name for each in session.get_outputs()]
        self.providers: list[str] = session.get_providers()

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        binding = self.session.io_binding()
        alive = [tensor.detach().contiguous() for tensor in tensors]
        for name, tensor in zip(self.inputs, alive, strict=True):
            binding.bind_input(
                name,
                tensor.device.type,
                tensor.device.index or 0,
                ELEMENT_TYPES[tensor.dtype],
                list(tensor.shape),
                tensor.data_ptr(),
            )
        device = tensors[0].device
        for name in self.outputs:
            binding.bind_output(name, device.type, device.index or 0)
        binding.synchronize_inputs()
        self.session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return [torch.from_dlpack(value) for value in binding.get_outputs()]
