"""From a captured model to a `torch.export` program and the manifest that goes with it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...kernels.errors import ExportError, first_line
from ...passes import PassResult
from ...passes.graph.nodes import results_of, value_of
from ...passes.pade import StackState
from .. import __version__
from ..options import Options
from ..runtime.sizes import Size, size_of
from .capture import Captured, signature_of
from .manifest import (
    FORMAT,
    Constant,
    Manifest,
    PassRecord,
    StateSpec,
    StreamSpec,
    TensorSpec,
    name_of,
)
from .paths import Path

__all__ = ["exported_program", "machine", "manifest_of", "to_program"]


@torch.no_grad()
def exported_program(captured: Captured) -> torch.export.ExportedProgram:
    """The captured step as torch.export has it; sizes that can be free are."""
    free = torch.export.Dim.AUTO
    shapes: tuple[Any, ...] = tuple(
        {dim: free for dim, size in enumerate(value_of(node).shape)
         if isinstance(size, torch.SymInt)}
        for node in captured.nodes
    )  # fmt: skip
    return to_program(captured.step, captured.examples, (shapes,))


def to_program(
    module: nn.Module, examples: tuple[Tensor, ...], shapes: tuple[Any, ...] | None = None
) -> torch.export.ExportedProgram:
    """`torch.export.export` with shapes that are free as `shapes` says; ExportError if it fails."""
    try:
        return torch.export.export(module, examples, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises whatever its tracing meets
        raise ExportError(
            f"torch.export can't export the rewritten graph: {first_line(error)}"
        ) from error


def manifest_of(
    model: nn.Module,
    captured: Captured,
    program: torch.export.ExportedProgram | None,
    options: Options,
    versions: Mapping[str, str],
) -> Manifest:
    """What the engine has to know. Shapes are those of `program`, where it fixed more sizes.

    program: of the captured step; None where all sizes are fixed anyway.
    """
    parameters = signature_of(model).parameters.values()
    inputs = _inputs(captured, program)
    count = len(captured.paths)
    results = results_of(captured.program.module.graph)
    outputs = tuple(
        _spec(_name(path) or "output", path, results[index]) for path, index in captured.outputs
    )
    state = captured.program.state
    return Manifest(
        format=FORMAT,
        model=type(model).__name__,
        parameters=tuple(p.name for p in parameters if p.kind is not p.VAR_KEYWORD),
        defaults={p.name: p.default for p in parameters if _is_plain(p.default)},
        inputs=inputs[:count],
        symbols=dict(captured.symbols),
        conditions=captured.conditions,
        ignored=captured.ignored,
        constants=_constants(captured.constants),
        outputs=outputs,
        result_constants=_constants(captured.result_constants),
        state=None if state is None else _state(captured, state, inputs[count:]),
        passes=tuple(map(_record, captured.results)),
        options=options.plain(),
        weights_sha256=_weights_hash(model),
        versions={"torch": torch.__version__, "accel": __version__, **versions},
        machine=machine(captured.examples[0].device),
        config=_config(model),
    )


def machine(device: torch.device) -> dict[str, str]:
    """What compiled code depends on."""
    found = {"device": device.type, "system": platform.system(), "processor": platform.machine()}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found["capability"] = f"sm_{major}{minor}"
    else:
        found["capability"] = torch.backends.cpu.get_cpu_capability()
    return found


def _name(path: Path) -> str:
    return "_".join(map(str, path)).replace(".", "_")


def _spec(name: str, path: Path, node: fx.Node) -> TensorSpec:
    value = value_of(node)
    return TensorSpec(name, path, tuple(map(size_of, value.shape)), name_of(value.dtype))


def _inputs(
    captured: Captured, program: torch.export.ExportedProgram | None
) -> tuple[TensorSpec, ...]:
    """The specification of every input, fixed sizes included."""
    names = [_name(path) for path in captured.paths]
    names += [node.name for node in captured.nodes[len(names) :]]
    if program is None:
        paths = [*captured.paths, *[()] * (len(names) - len(captured.paths))]
        return tuple(map(_spec, names, paths, captured.nodes))
    nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    found = []
    for index, name in enumerate(program.graph_signature.user_inputs):
        path = captured.paths[index] if index < len(captured.paths) else ()
        spec = _spec(names[index], path, captured.nodes[index])
        traced = nodes[str(name)].meta["val"].shape
        shape = tuple(
            int(fixed) if isinstance(fixed, int) else size
            for size, fixed in zip(spec.shape, traced, strict=True)
        )
        found.append(dataclasses.replace(spec, shape=shape))
    return tuple(found)


def _state(captured: Captured, state: StackState, inputs: tuple[TensorSpec, ...]) -> StateSpec:
    if not state.clock.latents:
        raise ExportError(
            "none of the inputs is recognised as the noisy sample, so an engine could not tell one "
            'run from the next and would never skip; {"pade": False} exports the model without a '
            "skip branch"
        )
    module = captured.program.module
    placeholders = list(module.graph.find_nodes(op="placeholder"))
    position = {node: index for index, node in enumerate(captured.nodes)}
    ours = {index: position[node] for index, node in enumerate(placeholders) if node in position}
    results = results_of(module.graph)[captured.program.outputs :]
    outputs = tuple(
        _spec(slot.name, (), node) for slot, node in zip(state.outputs, results, strict=True)
    )

    def sizes(shape: tuple[Any, ...]) -> tuple[Size, ...]:
        return tuple(map(size_of, shape))

    return StateSpec(
        inputs=inputs,
        outputs=outputs,
        streams=tuple(
            StreamSpec(sizes(s.shape), name_of(s.dtype), sizes(s.moments)) for s in state.streams
        ),
        batch=size_of(state.batch),
        times=tuple(ours[index] for index in state.clock.times),
        latents=tuple(ours[index] for index in state.clock.latents),
        answers=state.clock.answers,
        # Those that are no input of the engine (held by a module, say) are constants of the graph.
        conditions=tuple(ours[index] for index in state.clock.conditions if index in ours),
        blocks=state.blocks,
        bytes=state.bytes(),
    )


def _record(result: PassResult) -> PassRecord:
    return PassRecord(
        result.name, result.matched, tuple(map(str, result.skipped)), dict(result.details)
    )


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool))


def _constants(found: tuple[tuple[Path, Any], ...]) -> tuple[Constant, ...]:
    constants = []
    for path, value in found:
        if not _is_plain(value):
            raise ExportError(
                f"the argument {_name(path)} is a {type(value).__name__}; an engine can take "
                "tensors, numbers, strings, True, False and None"
            )
        constants.append(Constant(path, value))
    return tuple(constants)


def _weights_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()


def _config(model: nn.Module) -> dict[str, Any]:
    """The model's own configuration, as far as JSON can hold it."""
    config = getattr(model, "config", {})
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    found = {}
    for key, value in dict(config).items():
        try:
            found[str(key)] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            continue
    return found
