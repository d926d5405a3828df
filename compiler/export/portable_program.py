"""Engines as portable programs of `torch.export` (`.ep`)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ...kernels.errors import EngineError, ExportError, first_line
from ...passes import Feature
from ...passes.graph.nodes import copy_module, graph_modules
from .formats import Format
from .manifest import Manifest
from .torch_archive import MANIFEST, device_of, manifest_in, records_of, seal_archive

__all__ = ["PortableProgram", "ProgramRunner"]

# What says where in the model's source a node is from: most of a file, with the paths of the
# machine that wrote it.
ORIGINS = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")
# Records that torch reads as JSON, as text or as a tensor's bytes. Others it would unpickle, load
# as machine code or not read at all.
SAMPLES = "data/sample_inputs/model.pt"  # unpickled unless it is empty
CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
RAW = re.compile(r"(weight|tensor)_\d+")
HARMLESS = re.compile(
    rf"models/model\.json|data/(weights|constants)/{RAW.pattern}|extra/[\w.]+"
    r"|archive_format|archive_version|byteorder|\.data/(version|serialization_id)"
)


@dataclass(frozen=True)
class PortableProgram(Format):
    """A program of `torch.export` with its weights: no machine code, none of accel's operators.

    Torch runs it operator by operator, on the kind of device that it was made on; versions of
    torch whose programs have the same schema read it. So does `torch.export.load`, to have it
    compiled anew: `torch.compile(torch.export.load(open("model.ep", "rb")).module())`.
    Nothing in it is unpickled: a file that holds a pickle is refused. Torch evaluates expressions
    of sizes in it as Python, so load only what you trust.
    """

    suffix: ClassVar[str] = ".ep"
    summary: ClassVar[str] = "run by torch, operator by operator"
    cannot: ClassVar[Mapping[Feature, str]] = {
        Feature.SHARED_SUBGRAPHS: "torch.export.save writes a shared subgraph out at every call, "
        "and torch.compile (2.13) refuses such calls in a program that is compiled anew",
    }

    def write(self, program: ExportedProgram, manifest: Manifest, path: Path) -> None:
        about = {MANIFEST: manifest.write()}
        try:
            with path.open("wb") as file:
                torch.export.save(_bare(program), file, extra_files=about)
        except Exception as error:  # torch raises whatever its serialising meets
            raise ExportError(
                f"torch.export.save can't write the rewritten graph: {first_line(error)}"
            ) from error
        seal_archive(path)

    def read(self, path: Path) -> tuple[Manifest, ProgramRunner]:
        # Not `torch.export.load`, which goes on to an older layout, of pickles, where this fails.
        from torch.export.pt2_archive._package import load_pt2

        records = records_of(path)
        manifest = manifest_in(records, path)
        device_of(manifest, path)
        _refuse_pickles(records, path)
        try:
            with path.open("rb") as file:
                program = load_pt2(file).exported_programs["model"]
            runner = ProgramRunner(program)
        except Exception as error:  # torch checks a program by whatever building it meets
            written = manifest.versions.get("torch")
            raise EngineError(
                f"{path}: torch {torch.__version__} can't load it (written by torch {written}): "
                f"{first_line(error)}"
            ) from error
        for kind, specs, names in (
            ("inputs", manifest.graph_inputs, program.graph_signature.user_inputs),
            ("outputs", manifest.graph_outputs, program.graph_signature.user_outputs),
        ):
            if len(specs) != len(names):
                raise EngineError(
                    f"{path}: the graph has {len(names)} {kind}, not those of its manifest "
                    f"({len(specs)})"
                )
        return manifest, runner


def _bare(program: ExportedProgram) -> ExportedProgram:
    """The program without what torch would pickle (its example inputs) and without its origins."""
    module, _ = copy_module(program.graph_module)
    for part in graph_modules(module):
        for node in part.graph.nodes:
            for name in ORIGINS:
                node.meta.pop(name, None)
    return ExportedProgram(
        module,
        module.graph,
        program.graph_signature,
        program.state_dict,
        program.range_constraints,
        program.module_call_graph,
        constants=program.constants,
        verifiers=program.verifiers,
    )


def _refuse_pickles(records: Any, path: Path) -> None:
    """Raise EngineError for a record that is not of those that torch reads without running it."""
    for name in records.get_all_records():
        sound = HARMLESS.fullmatch(name) is not None
        if name in CONFIGS:
            sound = _all_raw(records.get_record(name))
        elif name == SAMPLES:
            sound = not records.get_record_size(name)
        if not sound:
            raise EngineError(
                f"{path}: holds {name}, which no engine of accel does: torch could unpickle or run "
                "it. Write it again with accel.export"
            )


def _all_raw(config: bytes) -> bool:
    """Whether all tensors in a list are kept as their bytes."""
    try:
        tensors = json.loads(config)["config"].values()
        return all(RAW.fullmatch(each["path_name"]) and not each["use_pickle"] for each in tensors)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # of another form
        return False


class ProgramRunner:
    """Calls a loaded program."""

    def __init__(self, program: ExportedProgram) -> None:
        # Sizes are checked by the engine, which names the argument.
        self.module = program.module(check_guards=False)
        self.providers = ["torch"]

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        # It was traced on contiguous inputs.
        results: Sequence[Tensor] = self.module(*(each.contiguous() for each in tensors))
        return results
