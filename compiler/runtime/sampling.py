"""The callable that Dynamo gets back: a rewritten graph together with the state it threads."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...kernels.predictors import judge
from ...passes import PadePass
from ...passes.pade import StackState, StreamState, rules
from ...passes.pade.rules import Carried, CarriedStream
from ...passes.pade.state import StreamInputs
from .sizes import evaluate, size_of
from .trajectory import Call, Relation, Run, Runs, current_explicit, digest, sketch

__all__ = ["Counters", "PadeGraph", "graphs_of"]

REMEMBERED_DIGESTS = 64

_numbers = itertools.count()
_graphs: weakref.WeakSet[PadeGraph] = weakref.WeakSet()


@dataclass
class Counters:
    """What happened at run time, for one model in one graph."""

    full_steps: int = 0
    predicted_steps: int = 0
    repeated_steps: int = 0
    untrusted_steps: int = 0
    gated_steps: int = 0
    nonfinite_steps: int = 0
    last_error: float = float("nan")


@dataclass
class _Model:
    """The runs and counters of one model. Dynamo may run several models by one graph."""

    owner: weakref.ref[Any]
    runs: Runs
    counters: Counters = field(default_factory=Counters)
    digests: dict[int, tuple[weakref.ref[Tensor], int, int]] = field(default_factory=dict)


class PadeGraph:
    """Calls a graph with a skip branch as if it had none.

    Every call is located in its sampling run, decided (compute or predict), executed with that
    run's state, and recorded. All of it is ordinary Python around one graph call: the graph itself
    has no side effects.

    symbols: for each symbol in a size, the input that is it, or the input and the dimension.
    outputs: how many of the graph's results are the model's own; they come first.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[Any]],
        symbols: Mapping[str, tuple[int, int | None]],
        outputs: int,
        state: StackState,
        options: PadePass,
        owner_index: int | None,
    ) -> None:
        self.number = next(_numbers)
        self.function = function
        self.outputs = outputs
        self.state = state
        self.options = options
        self.schedule = options.plan()
        self.models: dict[int, _Model] = {}
        self.lock = threading.Lock()
        self.symbols = symbols
        self.owner_index = owner_index
        _graphs.add(self)

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        with self.lock:
            model = self._model(inputs)
            runs = self._runs(model, inputs)
            run, relation = runs.locate(self._call(model, inputs))
            compute = self._decide(model, run, relation)
            now, streams = self._arguments(run, inputs)
            carried = run.carried
        packed = self.state.pack(torch.tensor(compute), streams)
        results = self.function(*inputs, *packed)
        with self.lock:
            self._record(run, relation, carried, compute, now, results[self.outputs :])
        return tuple(results[: self.outputs])

    # Locating

    def _model(self, inputs: Sequence[Any]) -> _Model:
        owner = inputs[self.owner_index] if self.owner_index is not None else self
        key = id(owner)
        model = self.models.get(key)
        if model is None or model.owner() is not owner:
            model = _Model(weakref.ref(owner), Runs(limit=self.options.max_runs))
            self.models[key] = model
            dead = [k for k, m in self.models.items() if m.owner() is None]
            for each in dead:
                del self.models[each]
        return model

    def _runs(self, model: _Model, inputs: Sequence[Any]) -> Runs:
        owner = model.owner()
        explicit = current_explicit(id(owner)) if owner is not None else None
        if explicit is None:
            return model.runs
        if self.number not in explicit.runs:
            if explicit.steps is not None:
                self.schedule.check(explicit.steps)
            explicit.runs[self.number] = Runs(
                limit=self.options.max_runs, steps=explicit.steps, single=True
            )
        return explicit.runs[self.number]

    def _digest(self, model: _Model, tensor: Tensor) -> int:
        """A condition's hash; computed once for a tensor object that stays unchanged."""
        if tensor.is_inference():  # such tensors don't count their changes
            return digest(tensor)
        known = model.digests.get(id(tensor))
        if known is not None and known[0]() is tensor and known[1] == tensor._version:
            return known[2]
        value = digest(tensor)
        if len(model.digests) >= REMEMBERED_DIGESTS:
            model.digests.clear()
        model.digests[id(tensor)] = (weakref.ref(tensor), tensor._version, value)
        return value

    def _call(self, model: _Model, inputs: Sequence[Any]) -> Call:
        clock = self.state.clock
        latents = [inputs[index] for index in clock.latents]
        conditions = (
            tuple(tuple(latent.shape) for latent in latents),
            *(self._digest(model, inputs[index]) for index in clock.conditions),
        )
        values = [torch.as_tensor(inputs[index]).double().flatten() for index in clock.times]
        # A guidance scale is embedded like a timestep; the one that changes is the time. Their
        # sum is as good a clock as the timestep alone, since a constant does not disturb it.
        time = float(torch.stack([value.mean() for value in values]).sum())
        return Call(conditions, time, sketch(latents))

    # Deciding

    def _decide(self, model: _Model, run: Run, relation: Relation) -> bool:
        counters = model.counters
        self._read_signals(counters, run)
        if relation is Relation.REPEAT:
            counters.repeated_steps += 1
            return run.computing or not run.known
        carried = run.carried
        planned = carried is None or self.schedule.computes(
            run.step, int(carried.last) - 1, run.steps
        )
        compute = carried is None or bool(rules.decide(carried, planned))
        if compute and not planned and run.known:
            if run.why_not == "gated":
                counters.gated_steps += 1
            else:
                counters.untrusted_steps += 1
        run.computing = compute
        if compute:
            counters.full_steps += 1
        else:
            counters.predicted_steps += 1
        return compute

    def _read_signals(self, counters: Counters, run: Run) -> None:
        """Take in what the last computed step said. Waits for the device, one step late."""
        if run.pending is None or run.carried is None:
            return
        signals = judge([each.cpu().double() for each in run.pending])
        run.pending = None
        streams = tuple(
            replace(each, moments=each.moments.cpu().double()) for each in run.carried.streams
        )
        run.carried = replace(run.carried, streams=streams)
        if run.known < 2:
            # On a run's first step there was nothing to predict from: its error means nothing.
            signals = replace(signals, turn=0.0, error=0.0)
        else:
            counters.last_error = signals.error
        run.signals = signals
        gate = self.options.stability_gate
        trusted = bool(
            rules.trusted(run.known, signals.finite, signals.error, self.options.max_error)
        )
        gated = trusted and gate is not None and not gate.allows(signals)
        run.why_not = "gated" if gated else "" if trusted else "untrusted"
        run.carried = replace(run.carried, trusted=not run.why_not)
        if not signals.finite:
            counters.nonfinite_steps += 1
            run.carried = run.carried.forget_newest()

    def _remaining(self, run: Run) -> float:
        if run.steps:
            return max(0.0, 1 - run.step / run.steps)
        return 1.0 if run.step == 0 else abs(run.times[-1] / run.times[0]) if run.times[0] else 0.0

    # Executing and recording

    def _size(self, size: Any, inputs: Sequence[Any]) -> int:
        def symbol(name: str) -> int:
            index, dim = self.symbols[name]
            return int(inputs[index] if dim is None else inputs[index].shape[dim])

        return evaluate(size_of(size), symbol)

    def _arguments(self, run: Run, inputs: Sequence[Any]) -> tuple[Tensor, list[StreamInputs]]:
        """The step's own times, and what the graph is given of each stream."""
        times = [torch.as_tensor(inputs[index]) for index in self.state.clock.times]
        now = rules.sample_times(times, self._size(self.state.batch, inputs))
        if run.carried is None:
            blank = [self._blank(stream, inputs) for stream in self.state.streams]
            run.carried = rules.begin(self.state.predictor.history, now, blank)
        remaining = torch.tensor(self._remaining(run), dtype=now.dtype)
        return now, rules.arguments(self.state.predictor, run.carried, now, remaining)

    def _blank(self, stream: StreamState, inputs: Sequence[Any]) -> CarriedStream:
        """What a run carries of a stream before its first step."""
        shape = [self._size(size, inputs) for size in stream.shape]
        moments = [self._size(size, inputs) for size in stream.moments]
        nothing = torch.zeros(shape, dtype=stream.dtype, device=stream.device)
        predictor = self.state.predictor
        return CarriedStream(
            torch.zeros(moments, dtype=torch.float64),
            (nothing,) * predictor.history,
            nothing if predictor.reads_inputs else None,
        )

    def _record(
        self,
        run: Run,
        relation: Relation,
        before: Carried | None,
        compute: bool,
        now: Tensor,
        state: Sequence[Tensor],
    ) -> None:
        assert before is not None
        results = self.state.unpack(state)
        carried = rules.record(before, self.state.predictor, compute, True, now, results)
        if relation is Relation.REPEAT:
            carried = replace(carried, step=before.step, last=before.last)
        run.carried = carried
        if compute:
            run.carried = replace(run.carried, last=run.step + 1)
            run.pending = [each.moments for each in results]
        if run.steps is not None and run.step >= run.steps - 1:
            run.release()  # the run is over; a step after all would be computed


def graphs_of(parameters: frozenset[int]) -> list[tuple[PadeGraph, _Model]]:
    """The graphs and per-model records that belong to a model, by its parameters' ids."""
    found = []
    for graph in sorted(_graphs, key=lambda each: each.number):
        for model in list(graph.models.values()):
            owner = model.owner()
            if owner is not None and id(owner) in parameters:
                found.append((graph, model))
    return found
