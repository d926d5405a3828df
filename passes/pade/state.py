"""The state that a skip branch adds to a graph: its layout, written once.

Whoever fills it (the back end, an engine, a server's graph, a manifest) goes through `inputs`,
`outputs`, `pack` and `unpack`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ...kernels.predictors import Predictor
from ..graph.emit import Slot
from ..graph.nodes import hint
from .clock import Clock

__all__ = ["StackState", "StreamInputs", "StreamOutputs", "StreamState"]

CPU = torch.device("cpu")


@dataclass(frozen=True)
class StreamState:
    """One predicted residual: its shape (a size may be symbolic) and type, and the shapes of its
    moments and of the predictor's coefficients for it (None where it has none)."""

    shape: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device
    moments: tuple[Any, ...]
    coefficients: tuple[Any, ...] | None


class StreamInputs(NamedTuple):
    """What a step is given of one stream, tensors or nodes: see `StackState.inputs`."""

    coefficients: Any
    residuals: Sequence[Any]
    previous: Any


class StreamOutputs(NamedTuple):
    """What a step returns of one stream: see `StackState.outputs`."""

    moments: Any
    residual: Any
    stack_input: Any


@dataclass(frozen=True)
class StackState:
    """What the pass adds to a graph's border (`passes.base.State`).

    batch: samples whose times differ; 1 where the streams lay their samples end to end.
    clock: the inputs that say where in a run a call belongs. blocks: how many are skipped.
    """

    streams: tuple[StreamState, ...]
    batch: Any
    predictor: Predictor
    clock: Clock
    blocks: int

    @property
    def inputs(self) -> tuple[Slot, ...]:
        """`compute`, a 0-d bool on the CPU: run the blocks, or predict. Then for each stream: the
        predictor's coefficients for this step, float32 (where it has any), `history` residuals,
        newest first, and (only if it reads inputs) the stack's input on the previous step."""
        slots = [Slot("accel_compute", (), torch.bool, CPU)]
        for index, stream in enumerate(self.streams):
            form = stream.shape, stream.dtype, stream.device
            if stream.coefficients is not None:
                name = f"accel_coefficients_{index}"
                slots.append(Slot(name, stream.coefficients, torch.float32, stream.device))
            for age in range(self.predictor.history):
                slots.append(Slot(f"accel_residual_{age}_{index}", *form))
            if self.predictor.reads_inputs:
                slots.append(Slot(f"accel_previous_{index}", *form))
        return tuple(slots)

    @property
    def outputs(self) -> tuple[Slot, ...]:
        """For each stream: its moments, float32 (see `kernels.predictors.moments`; zeros where the
        step was predicted), the residual, and (as above) the stack's input."""
        slots = []
        for index, stream in enumerate(self.streams):
            form = stream.shape, stream.dtype, stream.device
            slots.append(
                Slot(f"accel_moments_{index}", stream.moments, torch.float32, stream.device)
            )
            slots.append(Slot(f"accel_residual_now_{index}", *form))
            if self.predictor.reads_inputs:
                slots.append(Slot(f"accel_stack_input_{index}", *form))
        return tuple(slots)

    def pack(self, compute: Any, streams: Sequence[StreamInputs]) -> list[Any]:
        """The values of `inputs`."""
        packed = [compute]
        for stream in streams:
            optional = [stream.coefficients, *stream.residuals, stream.previous]
            packed += [each for each in optional if each is not None]
        return packed

    def by_stream(self, values: Sequence[Any]) -> list[StreamInputs]:
        """The values of `inputs` but for the first, stream by stream."""
        rest, found = list(values), []
        for stream in self.streams:
            coefficients = None if stream.coefficients is None else rest.pop(0)
            residuals = [rest.pop(0) for _ in range(self.predictor.history)]
            previous = rest.pop(0) if self.predictor.reads_inputs else None
            found.append(StreamInputs(coefficients, residuals, previous))
        return found

    def unpack(self, results: Sequence[Any]) -> list[StreamOutputs]:
        """The values of `outputs`, stream by stream; `results` begins with them."""
        width = 2 + self.predictor.reads_inputs
        starts = range(0, width * len(self.streams), width)
        return [
            StreamOutputs(results[start], results[start + 1],
                          results[start + 2] if self.predictor.reads_inputs else None)
            for start in starts
        ]  # fmt: skip

    def bytes(self) -> int:
        """Bytes of one run's state, with symbolic sizes at their hints."""
        kept = self.predictor.history + self.predictor.reads_inputs
        return kept * sum(
            math.prod(map(hint, stream.shape)) * stream.dtype.itemsize for stream in self.streams
        )
