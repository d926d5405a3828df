"""An engine: a loaded file that is called like the model it was made from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels.errors import EngineError
from ...kernels.predictors import resolve
from ...passes import PadePass
from ...passes.pade import StackState, StreamState
from ...passes.pade.clock import Clock
from ..runtime.sampling import PadeGraph
from ..runtime.sizes import evaluate
from ..stats import Stats
from .formats import Runner
from .manifest import Manifest, TensorSpec, dtype_of, name_of
from .paths import Path, flatten, nested

__all__ = ["Engine", "Output"]


class Named(dict[str, Any]):
    """Values by name: as entries and as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no {name!r} here, only {', '.join(self)}") from None


class Output(Named):
    """A model's result by name, and in order by number."""

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, (int, slice)):
            return list(self.values())[key]
        return super().__getitem__(key)


class Engine:
    """A model as `accel.export` wrote it, with its skip branch and the state that this needs.

    Call it like the model. It takes torch tensors of the shapes and types of `manifest.inputs`,
    and tells sampling runs apart as the backend does; `accel.stats` and `accel.trajectory` work on
    it too. `reset()` forgets all runs. It can stand in for the transformer of a diffusers pipeline.

    config, dtype, device: of the model. providers: what runs it.
    """

    def __init__(self, manifest: Manifest, runner: Runner) -> None:
        self.manifest = manifest
        self.runner = runner
        self.providers = runner.providers
        self._sound: set[tuple[int, ...]] = set()  # sizes that meet all conditions
        self.config = Named(manifest.config)
        self.device = torch.device(manifest.machine.get("device", "cpu"))
        floats = [s.dtype for s in manifest.outputs if dtype_of(s.dtype).is_floating_point]
        self.dtype = dtype_of(floats[0]) if floats else torch.float32
        self.graph: PadeGraph | None = None
        if manifest.state is not None:
            self.graph = _stateful(manifest, runner)

    def __repr__(self) -> str:
        kind = "stateful" if self.graph else "stateless"
        return f"Engine({self.manifest.model}, {kind}, {', '.join(self.providers)})"

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model. Raises EngineError for inputs that it was not built for."""
        arguments = self._arguments(args, kwargs)
        return_dict = bool(
            arguments.pop("return_dict", self.manifest.defaults.get("return_dict", True))
        )
        inputs = self._inputs(arguments)
        results = (self.graph or self.runner)(*inputs)
        return self._result(results, return_dict)

    def stats(self) -> Stats:
        """What it has done so far; the same as `accel.stats(engine)`."""
        from ..report import stats

        return stats(self)

    def reset(self) -> None:
        """Forget all sampling runs, with their state and their counters."""
        if self.graph is not None:
            with self.graph.lock:
                self.graph.models.clear()

    def _arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        names = self.manifest.parameters
        if len(args) > len(names):
            raise EngineError(f"{len(args)} positional arguments; {self.manifest.model} has "
                              f"{len(names)}: {', '.join(names)}")  # fmt: skip
        paths = [*(spec.path for spec in self.manifest.inputs), *self.manifest.ignored]
        paths += [each.path for each in self.manifest.constants]
        known = {*names, *(str(path[0]) for path in paths)}  # the latter by **kwargs
        strange = sorted(set(kwargs) - known)
        if strange:
            raise EngineError(f"{self.manifest.model} has no argument {strange[0]!r}; it has "
                              f"{', '.join(names)}")  # fmt: skip
        given = dict(zip(names, args, strict=False))
        twice = sorted(set(given) & set(kwargs))
        if twice:
            raise EngineError(f"{twice[0]} is given twice, by position and by name")
        return given | dict(kwargs)

    def _inputs(self, arguments: Mapping[str, Any]) -> list[Tensor]:
        """The graph's inputs, checked."""
        manifest = self.manifest
        found = dict(flatten(dict(arguments)))
        inputs = []
        for spec in manifest.inputs:
            value = found.pop(spec.path, None)
            if not isinstance(value, Tensor):
                seen = "it is missing" if value is None else f"it is a {type(value).__name__}"
                raise EngineError(f"{_where(spec.path)} has to be {_form(spec)}; {seen}")
            if len(value.shape) != len(spec.shape) or value.dtype != dtype_of(spec.dtype):
                raise EngineError(f"{_where(spec.path)} has to be {_form(spec)}; it is "
                                  f"{_seen(value)}")  # fmt: skip
            inputs.append(value)
        symbols = {name: inputs[i].shape[dim] for name, (i, dim) in manifest.symbols.items()}
        for spec, value in zip(manifest.inputs, inputs, strict=True):
            if value.device.type != self.device.type:
                raise EngineError(f"{_where(spec.path)} is on {value.device}; the engine was "
                                  f"built for {self.device}")  # fmt: skip
            wanted = [evaluate(size, symbols) for size in spec.shape]
            if list(value.shape) != wanted:
                raise EngineError(
                    f"{_where(spec.path)} has to be {_form(spec)}, here {wanted}; it is "
                    f"{_seen(value)}"
                )
        self._check_conditions(symbols)
        self._check_constants(found)
        return inputs

    def _check_conditions(self, symbols: Mapping[str, int]) -> None:
        """The model takes its way by sizes; the engine knows only that of its example inputs."""
        sizes = tuple(symbols.values())
        if sizes in self._sound:
            return
        for condition in self.manifest.conditions:
            if not evaluate(condition, symbols):
                seen = ", ".join(f"{n} = {size}" for n, size in symbols.items() if n in condition)
                raise EngineError(
                    f"the model computes otherwise for inputs of these sizes ({seen}) than for the "
                    f"example inputs, where {condition}. Export it with inputs of these sizes"
                )
        self._sound.add(sizes)

    def _check_constants(self, given: Mapping[Path, Any]) -> None:
        """What is not an input of the graph has to be what it was when the engine was made."""
        fixed = {each.path: each.value for each in self.manifest.constants}
        fixed.pop(("return_dict",), None)
        for path in fixed.keys() | given.keys():
            if path in self.manifest.ignored:
                continue
            default = self.manifest.defaults.get(str(path[0])) if len(path) == 1 else None
            here, built = given.get(path, default), fixed.get(path, default)
            same = type(here) is type(built) and here == built
            if not same:
                seen = _seen(here) if isinstance(here, Tensor) else repr(here)
                raise EngineError(
                    f"{_where(path)} was {built!r} when the engine was made, and is part of it; "
                    f"here it is {seen}. Export the model again with that value"
                )

    def _result(self, results: Sequence[Tensor], return_dict: bool) -> Any:
        manifest = self.manifest
        leaves: dict[Path, Any] = {
            spec.path: value for spec, value in zip(manifest.outputs, results, strict=True)
        }
        leaves |= {each.path: each.value for each in manifest.result_constants}
        result = nested(leaves)
        if not isinstance(result, dict):
            return result
        if "return_dict" in manifest.parameters and not return_dict:
            return tuple(value for value in result.values() if value is not None)
        return Output(result)

    # What diffusers' pipelines ask of a transformer.

    @contextlib.contextmanager
    def cache_context(self, name: str, **kwargs: Any) -> Iterator[None]:
        """Nothing to do: guidance branches are told apart by their inputs."""
        yield

    def to(self, *args: Any, **kwargs: Any) -> Engine:
        """The engine itself; EngineError for another device or type than it was built for."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.dtype) and value != self.dtype:
                raise EngineError(f"the engine computes in {self.dtype}, not {value}")
            if isinstance(value, (str, torch.device)):
                device = torch.device(value)
                if device.type != self.device.type:
                    raise EngineError(f"the engine was built for {self.device}, not {device}")
        return self

    def eval(self) -> Engine:
        """The engine itself; it knows no training."""
        return self


def _stateful(manifest: Manifest, runner: Runner) -> PadeGraph:
    spec = manifest.state
    pade = manifest.parsed_options().of(PadePass)
    if spec is None or pade is None:
        raise EngineError("the manifest has a state but its options turn the Padé pass off")
    device = torch.device(manifest.machine.get("device", "cpu"))
    given = {each.name: each.shape for each in spec.inputs}
    state = StackState(
        streams=tuple(
            StreamState(
                stream.shape, dtype_of(stream.dtype), device, stream.moments,
                given.get(f"accel_coefficients_{index}"),
            )
            for index, stream in enumerate(spec.streams)
        ),
        batch=spec.batch,
        predictor=resolve(pade.predictor),
        clock=Clock(spec.times, spec.latents, spec.answers, spec.conditions),
        blocks=spec.blocks,
    )  # fmt: skip
    for what, specs, slots in (
        ("inputs", spec.inputs, state.inputs), ("outputs", spec.outputs, state.outputs)
    ):  # fmt: skip
        if len(specs) != len(slots):
            raise EngineError(
                f"the manifest has {len(specs)} {what} of state; predictor {pade.predictor!r} "
                f"needs {len(slots)}"
            )
    symbols = {name: (where[0], where[1]) for name, where in manifest.symbols.items()}
    return PadeGraph(runner, symbols, len(manifest.outputs), state, pade)


def _where(path: Path) -> str:
    return str(path[0]) + "".join(f"[{key!r}]" for key in path[1:]) if path else "the input"


def _form(spec: TensorSpec) -> str:
    return f"{spec.dtype} [{', '.join(map(str, spec.shape))}]"


def _seen(tensor: Tensor) -> str:
    return f"{name_of(tensor.dtype)} {list(tensor.shape)}"
