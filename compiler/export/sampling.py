"""Running an engine from the command line: on stored inputs, or in a whole sampling loop."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...kernels.errors import EngineError, MissingDependencyError
from ..report import trajectory
from .engine import Engine
from .manifest import TensorSpec, dtype_of

__all__ = ["read_inputs", "run_once", "run_schedule", "write_outputs"]


def _numpy() -> Any:
    try:
        return importlib.import_module("numpy")
    except ImportError as error:
        raise MissingDependencyError(
            "reading .npz files needs numpy: pip install 'accel-compiler[examples]'"
        ) from error


def read_inputs(engine: Engine, path: Path) -> dict[str, Tensor]:
    """The engine's inputs from an `.npz` file, by the names in its manifest."""
    numpy = _numpy()
    known = {spec.name: spec for spec in engine.manifest.inputs}
    try:
        with numpy.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError) as error:
        raise EngineError(f"{path}: not an .npz file of plain arrays: {error}") from error
    for name in arrays:
        if name not in known:
            raise EngineError(f"{path} has {name!r}; the engine takes {', '.join(known)}")
    return {name: torch.from_numpy(array).to(dtype_of(known[name].dtype))
            for name, array in arrays.items()}  # fmt: skip


def write_outputs(path: Path, outputs: Mapping[str, Tensor]) -> None:
    """Tensors by name as an `.npz` file."""
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in outputs.items()}
    with path.open("wb") as file:
        _numpy().savez(file, **arrays)


def _arguments(engine: Engine, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Named tensors as the arguments of a call, nested where the model's were."""
    arguments: dict[str, Any] = {}
    for spec in engine.manifest.inputs:
        if spec.name not in tensors:
            raise EngineError(f"the input {spec.name!r} is missing; the engine takes "
                              f"{', '.join(s.name for s in engine.manifest.inputs)}")  # fmt: skip
        place: Any = arguments
        for key, following in zip(spec.path[:-1], spec.path[1:], strict=True):
            place = place.setdefault(key, {} if isinstance(following, (str, int)) else None)
        place[spec.path[-1]] = tensors[spec.name]
    return {name: _sequences(value) for name, value in arguments.items()}


def _sequences(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    inner = {key: _sequences(each) for key, each in value.items()}
    if all(isinstance(key, int) for key in inner):
        return [inner[key] for key in sorted(inner)]
    return inner


def run_once(engine: Engine, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One call; the result's tensors by name."""
    arguments = _arguments(engine, tensors)
    constants = {str(each.path[0]): each.value for each in engine.manifest.constants
                 if len(each.path) == 1 and each.path != ("return_dict",)}  # fmt: skip
    if "return_dict" in engine.manifest.parameters:
        constants["return_dict"] = True
    result = engine(**{**constants, **arguments})
    leaves = result if isinstance(result, Mapping) else {"output": result}
    return {name: value for name, value in leaves.items() if isinstance(value, Tensor)}


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
    try:
        diffusers = importlib.import_module("diffusers")
    except ImportError as error:
        raise MissingDependencyError(
            "schedulers come from diffusers: pip install 'accel-compiler[examples]'"
        ) from error
    kind = getattr(diffusers, scheduler, None)
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
    with trajectory(engine, steps=len(plan.timesteps)):
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
