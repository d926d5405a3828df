"""Ahead of time: a model with its skip branch as one file, and the engine that runs it."""

from __future__ import annotations

import dataclasses
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
from .aoti_package import AotiPackage
from .capture import Captured, capture
from .engine import Engine
from .formats import Format
from .manifest import Manifest
from .onnx_file import OnnxFile
from .paths import flatten
from .portable_program import PortableProgram
from .program import exported_program, manifest_of
from .trial import try_out

__all__ = ["FORMATS", "Engine", "Manifest", "export", "load"]

FORMATS: tuple[type[Format], ...] = (OnnxFile, AotiPackage, PortableProgram)


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
    free (else all are fixed; some models can be translated only then). path: ends in the suffix of
    one of `accel.compiler.export.FORMATS`, such as ".onnx". options: as for the backend, but for
    `lowering`.
    Raises ExportError if the model can't be captured whole, the predictor is an object that is none
    of accel's own, the format can't hold the graph, or the engine computes something else on the
    example inputs than the model; then no file is left behind. What a pass did not do is in
    `engine.manifest.passes`.
    """
    target = Path(path)
    form = _format(target, ExportError)()
    parsed = parse_options(options)
    if parsed.lowering != Options().lowering:
        raise OptionError(
            f"lowering {parsed.lowering!r} is for torch.compile; an engine is compiled by what its "
            "format stands for"
        )
    _check_predictor(parsed)
    captured = capture(
        model, args, kwargs or {}, parsed, form.cannot, free=free_sizes, plain=form.plain
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


def load(path: str | os.PathLike[str], **options: Any) -> Engine:
    """The engine in a file that `export` wrote.

    options: those of the file's format, which are the fields of its class in `FORMATS`; for
    ".onnx" `providers`, onnxruntime's execution providers in order of preference.
    Nothing is unpickled, but a file may hold code, as its format's class says: a ".pt2" does, so
    load only what you trust. Raises EngineError for a file that is damaged, foreign, or built for
    another machine, and OptionError for an option that its format does not have.
    """
    source = Path(path)
    form = _format(source, EngineError)
    for name in options:
        if name not in _options(form):
            others = [each.suffix for each in FORMATS if name in _options(each)]
            known = ", ".join(_options(form)) or "none"
            raise OptionError(
                f"{source}: {name!r} is an option of {_either(others) if others else 'no format'}; "
                f"those of {form.suffix}: {known}"
            )
    manifest, runner = form(**options).read(source)
    return Engine(manifest, runner)


def _options(form: type[Format]) -> list[str]:
    return [field.name for field in dataclasses.fields(form)]


def _format(path: Path, error: type[Exception]) -> type[Format]:
    for form in FORMATS:
        if path.suffix == form.suffix:
            return form
    known = _either([form.suffix for form in FORMATS])
    raise error(f"{path}: the name has to end in {known}, not {path.suffix or 'nothing'!r}")


def _either(words: Sequence[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last
