"""Ahead of time: a model with its skip branch as one file, and the engine that runs it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ...kernels.errors import EngineError, ExportError, OptionError
from ...kernels.predictors import PREDICTORS, predictor_name
from ...passes import PadePass
from ..options import Options, parse_options
from . import aoti_package, onnx_file
from .capture import Captured, capture
from .engine import Engine
from .manifest import Manifest
from .paths import flatten
from .program import exported_program, manifest_of
from .trial import try_out

__all__ = ["Engine", "Manifest", "export", "load"]

FORMATS: dict[str, Any] = {".onnx": onnx_file, ".pt2": aoti_package}


def export(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    path: str | os.PathLike[str],
    options: Options | Mapping[str, Any] | None = None,
    free_sizes: bool = True,
) -> Engine:
    """Write `model` with its skip branch as one file, and load it.

    args, kwargs: example inputs. free_sizes: every size above 1 that the model leaves free stays
    free (else all are fixed; some models can be translated only then). path: ends in ".onnx" (needs
    the extra `onnx`) or ".pt2" (AOTInductor, compiled for this machine). options: as for the
    backend, but for `lowering`.
    Raises ExportError if the model can't be captured whole, the predictor is an object that is none
    of accel's own, the format can't hold the graph, or the engine computes something else on the
    example inputs than the model; then no file is left behind. What a pass did not do is in
    `engine.manifest.passes`.
    """
    target = Path(path)
    form = _format(target, ExportError)
    parsed = parse_options(options)
    if parsed.lowering != Options().lowering:
        raise OptionError(
            f"lowering {parsed.lowering!r} is for torch.compile; an engine is compiled by what its "
            "format stands for"
        )
    _check_predictor(parsed)
    captured = capture(
        model, args, kwargs or {}, parsed, form.CANNOT, free=free_sizes, plain=form.PLAIN
    )
    program = exported_program(captured)
    manifest = manifest_of(model, captured, program, parsed, form.versions())
    # Written beside its place, and moved there once it is whole, loads, and computes the same.
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".accel-") as folder:
        written = Path(folder) / target.name
        form.write(program, manifest, written)
        try:
            engine = load(written)
        except EngineError as error:
            raise ExportError(f"the engine that was written does not load: {error}") from error
        try_out(
            lambda: _run(engine, captured, args, kwargs or {}), captured.expected,
            captured.selective,
        )  # fmt: skip
        for new, place in zip(form.files(written), form.files(target), strict=True):
            if new.is_file():
                os.replace(new, place)
            else:
                place.unlink(missing_ok=True)  # of an earlier engine of that name
    return engine


def _check_predictor(options: Options) -> None:
    """Raise ExportError for a predictor that an engine could not have without a user's code."""
    pade = options.of(PadePass)
    if pade is not None and not isinstance(pade.predictor, str):
        raise ExportError(
            f"the predictor {predictor_name(pade.predictor)} is an object: an engine calls its "
            "coefficients() between steps, and an engine's file holds the names of accel's own "
            f"predictors ({', '.join(PREDICTORS)}), no code. In a server's model repository "
            "(accel.compiler.export.serving.export_repository) they are part of the graph"
        )


def _run(engine: Engine, captured: Captured, args: Any, kwargs: Mapping[str, Any]) -> list[Any]:
    """The tensors of the engine's result on the example inputs, in the captured order."""
    names = {"return_dict": True} if "return_dict" in engine.manifest.parameters else {}
    found = dict(flatten(engine(*args, **{**kwargs, **names})))
    engine.reset()
    return [found[path] for path, _ in captured.outputs]


def load(path: str | os.PathLike[str], *, providers: Sequence[str] | None = None) -> Engine:
    """The engine in a file that `export` wrote.

    providers: for ".onnx", onnxruntime's execution providers in order of preference; by default
    all that it has. Nothing is unpickled. A ".pt2" file holds machine code, so load only what you
    trust. Raises EngineError for a file that is damaged, foreign, or built for another machine.
    """
    source = Path(path)
    form = _format(source, EngineError)
    if providers is None:
        manifest, runner = form.read(source)
    elif form is onnx_file:
        manifest, runner = form.read(source, providers)
    else:
        raise EngineError(f"{source}: providers are for .onnx engines")
    return Engine(manifest, runner)


def _format(path: Path, error: type[Exception]) -> Any:
    if path.suffix not in FORMATS:
        known = " or ".join(FORMATS)
        raise error(f"{path}: the name has to end in {known}, not {path.suffix or 'nothing'!r}")
    return FORMATS[path.suffix]
