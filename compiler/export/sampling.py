"""Running an engine from the command line: on stored inputs, or in a whole sampling loop."""

from __future__ import annotations

import inspect
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...kernels.errors import EngineError
from ..extras import optional
from ..report import trajectory
from .engine import Engine
from .manifest import TensorSpec, dtype_of, name_of
from .paths import Path as Place
from .paths import flatten, nested

__all__ = ["read_inputs", "run_once", "run_schedule", "write_outputs"]


def read_inputs(engine: Engine, path: Path) -> dict[str, Tensor]:
    """The engine's inputs from an `.npz` file, by the names in its manifest.

    Raises EngineError for another file, an unknown name, or values that the input's type can't
    hold (64-bit floats become 32-bit ones; floats do not become whole numbers).
    """
    numpy = optional("numpy", "examples")
    known = {spec.name: dtype_of(spec.dtype) for spec in engine.manifest.inputs}
    try:
        with numpy.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (AttributeError, EOFError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise EngineError(f"{path}: not an .npz file of plain arrays: {error}") from error
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    for name, tensor in tensors.items():
        if name not in known:
            raise EngineError(f"{path} has {name!r}; the engine takes {', '.join(known)}")
        if not torch.can_cast(tensor.dtype, known[name]):
            raise EngineError(f"{path}: {name} is {name_of(tensor.dtype)}; the engine takes "
                              f"{name_of(known[name])}")  # fmt: skip
    return {name: tensor.to(known[name]) for name, tensor in tensors.items()}


def write_outputs(path: Path, outputs: Mapping[str, Tensor]) -> None:
    """Tensors by name as an `.npz` file; bfloat16, which numpy lacks, as float32."""
    numpy = optional("numpy", "examples")
    plain = {
        name: tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        for name, tensor in outputs.items()
    }
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in plain.items()}
    with path.open("wb") as file:
        numpy.savez(file, **arrays)


def run_once(engine: Engine, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One call; the result's tensors by name."""
    manifest = engine.manifest
    arguments: dict[Place, Any] = {each.path: each.value for each in manifest.constants}
    for spec in manifest.inputs:
        if spec.name not in tensors:
            raise EngineError(f"the input {spec.name!r} is missing; the engine takes "
                              f"{', '.join(s.name for s in manifest.inputs)}")  # fmt: skip
        arguments[spec.path] = tensors[spec.name]
    found = dict(flatten(engine(**nested(arguments))))
    return {spec.name: found[spec.path] for spec in manifest.outputs}


def run_schedule(
    engine: Engine,
    tensors: Mapping[str, Tensor],
    scheduler: str,
    steps: int,
    seed: int,
    progress: Callable[[int], None] = lambda step: None,
) -> dict[str, Tensor]:
    """A whole sampling loop with one of diffusers' schedulers, by its class name.

    tensors: the starting noise and the conditions; the time comes from the scheduler. seed: of the
    noise that some schedulers add.
    """
    state = engine.manifest.state
    if state is None:
        raise EngineError("a sampling loop needs an engine with a timestep and a sample; this one "
                          "was made without the Padé pass. Run it on all its inputs")  # fmt: skip
    kind = getattr(optional("diffusers", "examples"), scheduler, None)
    if kind is None or not hasattr(kind, "set_timesteps"):
        raise EngineError(f"diffusers has no scheduler {scheduler!r}")
    plan: Any = kind()
    plan.set_timesteps(steps)
    specs = engine.manifest.inputs
    sample_spec, time_spec = specs[state.latents[0]], specs[state.times[0]]
    current = dict(tensors)
    if sample_spec.name not in current:
        raise EngineError(f"the starting noise {sample_spec.name!r} is missing from the inputs")
    sample = current[sample_spec.name] * getattr(plan, "init_noise_sigma", 1.0)
    scaling = hasattr(plan, "scale_model_input")
    takes = inspect.signature(plan.step).parameters
    generator = {"generator": torch.Generator().manual_seed(seed)} if "generator" in takes else {}
    # A Heun-like scheduler has more times than steps.
    with trajectory(engine, scheduler=plan):
        for step, time in enumerate(plan.timesteps):
            scaled = plan.scale_model_input(sample, time) if scaling else sample
            current[sample_spec.name] = scaled
            current[time_spec.name] = _time(time_spec, time, len(sample))
            prediction = next(iter(run_once(engine, current).values()))
            prediction = prediction[:, : sample.shape[1]]  # some predict a variance as well
            sample = plan.step(prediction, time, sample, **generator).prev_sample
            progress(step + 1)
    return {sample_spec.name: sample}


def _time(spec: TensorSpec, time: Tensor, batch: int) -> Tensor:
    shape = [batch] if spec.shape else []
    return time.to(dtype_of(spec.dtype)).expand(shape).clone()
