"""What an engine file says about itself: JSON inside the file, checked on reading."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass
from typing import Any

import torch

from ...kernels.errors import AccelError, EngineError, ExportError
from ..options import Options, parse_options
from ..runtime.sizes import Size, evaluate
from .paths import Path

__all__ = ["FORMAT", "Constant", "Manifest", "PassRecord", "StateSpec", "StreamSpec",
           "TensorSpec", "dtype_of", "name_of"]  # fmt: skip

FORMAT = 1
LIKELY = 64  # a size for which every sound size expression has a value

Plain = str | int | float | bool | None


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that crosses the engine's border.

    A size of an input may be an expression of symbols; that of an output is for the reader.
    """

    name: str
    path: Path
    shape: tuple[Size, ...]
    dtype: str


@dataclass(frozen=True)
class Constant:
    """A value that is no tensor and was fixed when the engine was made."""

    path: Path
    value: Plain


@dataclass(frozen=True)
class StreamSpec:
    """One stream of the block stack; see `passes.pade.StreamState`."""

    shape: tuple[Size, ...]
    dtype: str
    moments: tuple[Size, ...]


@dataclass(frozen=True)
class StateSpec:
    """The explicit state; see `passes.pade.StackState`.

    inputs, outputs: the state's tensors as the graph has them, after the model's own.
    times, latents, conditions: positions among the model's inputs. answers: for each of the latents
        the position among its outputs of the one that the next is made of.
    bytes: of one sampling run, at the sizes of the example inputs.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    streams: tuple[StreamSpec, ...]
    batch: Size
    times: tuple[int, ...]
    latents: tuple[int, ...]
    answers: tuple[int, ...]
    conditions: tuple[int, ...]
    blocks: int
    bytes: int


@dataclass(frozen=True)
class PassRecord:
    """A pass's result, in words."""

    name: str
    matched: tuple[str, ...]
    skipped: tuple[str, ...]
    details: dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """Everything that an engine needs besides the graph.

    parameters: of the model's forward, in order; defaults: those that have plain ones.
    inputs: in the graph's order. symbols: the input and the dimension that each is.
    conditions: on those symbols; the model would have gone another way where one does not hold.
    ignored: tensors that the model does not read.
    outputs: the model's result; the graph's other results are the state's.
    result_constants: what else is in the result (None, mostly).
    machine: what a compiled engine was built for. config: the model's own, where it has one.
    """

    format: int
    model: str
    parameters: tuple[str, ...]
    defaults: dict[str, Any]
    inputs: tuple[TensorSpec, ...]
    symbols: dict[str, tuple[int, ...]]
    conditions: tuple[str, ...]
    ignored: tuple[Path, ...]
    constants: tuple[Constant, ...]
    outputs: tuple[TensorSpec, ...]
    result_constants: tuple[Constant, ...]
    state: StateSpec | None
    passes: tuple[PassRecord, ...]
    options: dict[str, Any]
    weights_sha256: str
    versions: dict[str, str]
    machine: dict[str, str]
    config: dict[str, Any]

    @property
    def graph_inputs(self) -> tuple[TensorSpec, ...]:
        """All that the graph takes, the state last."""
        return (*self.inputs, *(self.state.inputs if self.state else ()))

    @property
    def graph_outputs(self) -> tuple[TensorSpec, ...]:
        """All that the graph returns, the state last."""
        return (*self.outputs, *(self.state.outputs if self.state else ()))

    def write(self) -> str:
        """As JSON. Raises ExportError for what JSON has no word for."""
        try:
            return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False)
        except ValueError as error:
            raise ExportError(
                "an option, a default or a constant argument is infinite or NaN, which a manifest "
                f"can't hold: {error}"
            ) from error

    @staticmethod
    def read(text: str) -> Manifest:
        """From JSON. Raises EngineError naming the entry that is missing or wrong."""
        try:
            data = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise EngineError(f"the manifest is not JSON: {error}") from error
        seen = data.get("format") if isinstance(data, dict) else None
        if seen != FORMAT:
            raise EngineError(f"the manifest has format {seen!r}; this version reads {FORMAT}")
        manifest: Manifest = _checked(Manifest, data, "manifest")
        manifest._check()
        return manifest

    def _check(self) -> None:
        """Raise EngineError where entries contradict each other or name what does not exist."""
        for name, where in self.symbols.items():
            index, dim = where if len(where) == 2 else (-1, -1)
            if not (0 <= index < len(self.inputs) and 0 <= dim < len(self.inputs[index].shape)):
                raise EngineError(f"the manifest says that {name} is at {where}")
        try:
            torch.device(self.machine.get("device", ""))
        except RuntimeError as error:
            raise EngineError(f"the manifest names no known device: {error}") from error
        sizes = [size for spec in self.inputs for size in spec.shape]
        if self.state is not None:
            self._check_state(self.state)
            sizes.append(self.state.batch)
            for stream in self.state.streams:
                dtype_of(stream.dtype)
                sizes += [*stream.shape, *stream.moments]
        for spec in (*self.graph_inputs, *self.graph_outputs):
            dtype_of(spec.dtype)
        for size in (*sizes, *self.conditions):
            evaluate(size, dict.fromkeys(self.symbols, LIKELY))
        self.parsed_options()

    def _check_state(self, state: StateSpec) -> None:
        for position in (*state.times, *state.latents, *state.conditions):
            if not 0 <= position < len(self.inputs):
                raise EngineError(f"the manifest refers to input {position}; there is none")
        if len(state.answers) != len(state.latents) or not all(
            0 <= position < len(self.outputs) for position in state.answers
        ):
            raise EngineError("the manifest's state has samples without outputs of their own")
        if not (state.streams and state.times and state.latents):
            raise EngineError("the manifest's state has no stream, no timestep or no sample")

    def parsed_options(self) -> Options:
        """The options it was made with."""
        try:
            return parse_options(self.options)
        except (AccelError, TypeError, ValueError) as error:
            raise EngineError(f"the manifest's options are not valid: {error}") from error


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number of JSON")


def dtype_of(name: str) -> torch.dtype:
    """A dtype by its name ("float32")."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise EngineError(f"the manifest names the dtype {name!r}, which torch does not have")
    return dtype


def name_of(dtype: torch.dtype) -> str:
    """A dtype's name ("float32")."""
    return str(dtype).removeprefix("torch.")


def _checked(kind: Any, value: Any, where: str) -> Any:
    """`value`, read from JSON, as `kind`; EngineError if it is anything else."""
    if kind is Any:
        return value
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        if not isinstance(value, dict) or set(value) != set(hints):
            keys = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise EngineError(f"{where} should have the entries {sorted(hints)}; it has {keys}")
        make: Any = kind
        return make(
            **{name: _checked(hint, value[name], f"{where}.{name}") for name, hint in hints.items()}
        )
    if origin is tuple and isinstance(value, list):
        return tuple(_checked(arguments[0], each, f"{where}[]") for each in value)
    if origin is dict and isinstance(value, dict):
        return {key: _checked(arguments[1], each, f"{where}.{key}") for key, each in value.items()}
    if origin in (typing.Union, types.UnionType):
        for choice in arguments:
            try:
                return _checked(choice, value, where)
            except EngineError:
                continue
    elif type(value) is kind and not (kind is float and not math.isfinite(value)):
        return value
    raise EngineError(f"{where} is {value!r:.60}, which is not {kind}")
