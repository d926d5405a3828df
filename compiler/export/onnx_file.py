"""Engines as ONNX files, run by onnxruntime."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...kernels.errors import EngineError, ExportError, MissingDependencyError
from .manifest import Manifest
from .seal import check_seal, seal

__all__ = ["OnnxRunner", "read", "versions", "write"]

MANIFEST = "accel.manifest"
# A last entry of `metadata_props` (field 14): key "accel.sha256", value 64 characters. Fields of a
# protobuf message may stand in any order, and a repeated one may be continued at the end.
SEAL = b"\x72\x50\x0a\x0caccel.sha256\x12\x40"
LEFT_OUT = {"outline": "torch.onnx.export writes a shared subgraph out at every call"}
LARGEST = 2**31 - 2**20  # bytes that fit in one protobuf file, with room for what is no weight

# Element types as ONNX numbers them (onnx.TensorProto.DataType).
ELEMENT_TYPES = {
    torch.float32: 1, torch.uint8: 2, torch.int8: 3, torch.int16: 5, torch.int32: 6,
    torch.int64: 7, torch.bool: 9, torch.float16: 10, torch.float64: 11, torch.bfloat16: 16,
}  # fmt: skip


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"ONNX engines need {name}: pip install 'accel-compiler[onnx]'"
        ) from error


def versions() -> dict[str, str]:
    """Of the libraries that write the file."""
    return {name: str(_import(name).__version__) for name in ("onnx", "onnxscript")}


def write(program: torch.export.ExportedProgram, manifest: Manifest, path: Path) -> None:
    """Write `program` with its manifest. Raises ExportError where ONNX can't hold it.

    Weights beyond `LARGEST` bytes go to a file of their own beside it (`<path>.data`).
    """
    onnx = _import("onnx")
    _import("onnxscript")
    state_inputs = manifest.state.inputs if manifest.state else ()
    state_outputs = manifest.state.outputs if manifest.state else ()
    try:
        with _quiet():
            converted: Any = torch.onnx.export(
                program,
                input_names=[spec.name for spec in (*manifest.inputs, *state_inputs)],
                output_names=[spec.name for spec in (*manifest.outputs, *state_outputs)],
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0]
        raise ExportError(f"torch.onnx.export can't express the rewritten graph: {reason}") from (
            error
        )
    # Stack traces of every node: half of a small file, and paths of the machine that wrote it.
    _import("onnx_ir.passes.common").ClearMetadataAndDocStringPass()(converted.model)
    converted.model.metadata_props[MANIFEST] = manifest.write()
    weights = sum(tensor.nbytes for tensor in program.state_dict.values())
    converted.save(str(path), external_data=weights > LARGEST)
    onnx.checker.check_model(str(path), full_check=True)
    seal(path, SEAL)


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


def read(path: Path, providers: Sequence[str] | None = None) -> tuple[Manifest, OnnxRunner]:
    """The manifest and a runner. Raises EngineError for a file that is not a sound engine."""
    check_seal(path, SEAL)
    runtime = _import("onnxruntime")
    if providers is None:  # all but the one that calls a remote service
        providers = [p for p in runtime.get_available_providers() if not p.startswith("Azure")]
    try:
        session = runtime.InferenceSession(str(path), providers=list(providers))
    except Exception as error:  # onnxruntime's errors share no class
        reason = str(error).strip().splitlines()[0]
        raise EngineError(f"{path}: onnxruntime can't load it: {reason}") from error
    text = session.get_modelmeta().custom_metadata_map.get(MANIFEST)
    if text is None:
        raise EngineError(f"{path}: an ONNX file without a manifest of accel")
    manifest = Manifest.read(text)
    state = manifest.state
    specs = (*manifest.inputs, *(state.inputs if state else ()))
    results = (*manifest.outputs, *(state.outputs if state else ()))
    for kind, wanted, found in (
        ("inputs", specs, session.get_inputs()),
        ("outputs", results, session.get_outputs()),
    ):
        names = [each.name for each in found]
        if [spec.name for spec in wanted] != names:
            raise EngineError(f"{path}: the graph's {kind} are {names}, not those of its manifest")
    return manifest, OnnxRunner(
        session, [spec.name for spec in specs], [spec.name for spec in results]
    )


class OnnxRunner:
    """Calls an onnxruntime session on torch tensors without copying them."""

    def __init__(self, session: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        self.session = session
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
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
