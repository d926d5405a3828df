"""The callable that Dynamo gets back: a rewritten graph together with the state it threads."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...kernels.predictors import judge
from ...passes import PadePass
from ...passes.pade import StackState, rules
from ...passes.pade.rules import Carried, CarriedAnswer, CarriedStream
from ...passes.pade.schedule import Schedule
from ...passes.pade.state import StreamInputs, StreamState
from .batches import begun_anew, gathered
from .digest import Later, at_hand
from .forecasts import Forecasts, Trial, tried
from .kept import Counters, Course, Model, Record, Weights, device_memory, state_bytes
from .origins import answered
from .provenance import MOST, WEIGHED
from .reading import Glimpse, Reader, Seen
from .runs import Runs
from .sizes import evaluate, size_of
from .steps import Call, Placed, Root
from .trajectory import Explicit, told

__all__ = ["PadeGraph", "graphs_of"]

SHARE = 20  # one part of a device's memory that state may take

_numbers = itertools.count()
_graphs: weakref.WeakSet[PadeGraph] = weakref.WeakSet()


@dataclass(frozen=True)
class _Plan:
    """What was decided for one call. fresh: samples that have no state yet. begun: of each sample,
    the step that its state begins at; left: the steps of its run that are left, this one included,
    where that is wanted and known, else 0. correction: see the option; course: see `Record`."""

    runs: Runs
    epoch: int
    call: Call
    placed: list[Placed]
    compute: bool
    carried: Carried
    fresh: list[int]
    begun: list[int]
    left: list[int]
    correction: float
    course: Course | None
    now: Tensor
    streams: list[StreamInputs]


class PadeGraph:
    """Calls a graph with a skip branch as if it had none.

    Every call is located in its sampling run, decided (compute or predict), executed with that
    run's state, and recorded. All of it is ordinary Python around one graph call: the graph itself
    has no side effects. The lock is held for bookkeeping alone, never while a device is waited for,
    and a call that raises leaves nothing behind.

    symbols: for each symbol in a size, the input that is it, or the input and the dimension.
    outputs: how many of the graph's results are the model's own; they come first.
    owned: the inputs that are the model's parameters.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[Any]],
        symbols: Mapping[str, tuple[int, int | None]],
        outputs: int,
        state: StackState,
        options: PadePass,
        owned: Sequence[int] = (),
    ) -> None:
        self.number = next(_numbers)
        self.function = function
        self.outputs = outputs
        self.state = state
        self.options = options
        self.forecasts = Forecasts(options, state.predictor)
        self.models: dict[frozenset[int], Model] = {}
        self.lock = threading.Lock()
        self.symbols = symbols
        self.owned = tuple(owned)
        self.reader = Reader(state.clock)
        _graphs.add(self)

    @property
    def schedule(self) -> Schedule:
        """That of its options."""
        return self.forecasts.default.schedule

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        known_by = id(inputs[self.owned[0]]) if self.owned else id(self)
        said, trial = told(known_by), tried(known_by)
        with self.lock:
            model = self._model(inputs)
            unread = list(model.unread)
        if self.forecasts.profile is not None:
            weights = [inputs[index] for index in self.owned]
            shapes = [
                [self._size(each, inputs) for each in stream.shape[1:]]
                for stream in self.state.streams
            ]
            self.forecasts.check(model, weights, shapes)
        if said is not None and said.moment is not None:
            unread = [each for each in unread if each.later is not None and each.later.ready()]
            seen = self.reader.told(said.run, said.moment, inputs)
            seen.left = [each.later.copies for each in unread if each.later is not None]
        else:
            unseen = [each.left for each in unread]
            most = self._positions(None if said is None else said.run)
            seen, waited = self.reader.read(model.hashes, inputs, unseen, most)
            model.counters.host_reads += waited
        if said is not None and said.branch is not None:
            seen.conditions = []  # the name says it
        with self.lock:
            for record, read in zip(unread, seen.left, strict=True):
                self._take_in(model, record, read)
            runs = model.runs if said is None else self._vouched(model, said.run, said.branch)
            plan = self._plan(model, runs, inputs, seen, trial)
        packed = self.state.pack(torch.tensor(plan.compute), plan.streams)
        results = list(self.function(*inputs, *packed))
        record = self._record(plan, inputs, results)
        if trial is not None and trial.seen is not None:
            assert record.carried is not None
            newest = [each.residuals[0] for each in record.carried.streams]
            trial.seen(self, plan.placed[0].step.depth, plan.now, newest)
        with self.lock:
            record.evaluations = plan.runs.add(plan.call, plan.placed, record)
            for each, placed, begun in zip(
                record.evaluations, plan.placed, plan.begun, strict=True
            ):
                each.last = each.step.depth + 1 if plan.compute else _last(placed)
                each.begun = begun
            model.counters.corrected_steps += record.corrected
            if record.left:
                model.unread.append(record)
            if at_hand(record.left):
                self._take_in(model, record, record.left)
            elif said is not None and said.moment is not None:
                record.later = Later(record.left)
            self._bound(plan.runs, record)
            self._release(plan, record)
        return tuple(results[: self.outputs])

    # Which model

    def _model(self, inputs: Sequence[Any]) -> Model:
        weights = [inputs[index] for index in self.owned]
        key = frozenset(map(id, weights)) or frozenset({id(self)})
        owner = weights[0] if weights else self
        model = self.models.get(key)
        if model is None or model.owner() is not owner:
            held: list[weakref.ref[Any]] = [weakref.ref(each) for each in weights or [self]]
            model = Model(
                weakref.ref(owner),
                held,
                Runs(self.options.max_runs, weighs=self.options.correction > 0),
            )
            self.models[key] = model
            for each in [k for k, m in self.models.items() if m.owner() is None]:
                del self.models[each]
        if not weights:
            return model
        if model.weights is None:
            model.weights = Weights(weights)
        elif model.weights.changed(weights):
            model.counters.weight_changes += 1
            model.epoch += 1
            model.weights = Weights(weights)
            model.runs.drop_states()
        return model

    def _positions(self, explicit: Explicit | None) -> int:
        """How many of each sample's positions are looked at: where the caller vouches for the run,
        nothing has to be proven, but what its sampler makes of outputs may be unknown."""
        if explicit is None:
            return MOST
        known = explicit.weights is not None or explicit.where is not None
        return 0 if known or not self.options.correction else WEIGHED

    def _vouched(self, model: Model, explicit: Explicit, branch: str | None) -> Runs:
        """The runs of an explicit one: each named branch has its own."""
        key = self.number, branch
        if key not in explicit.runs:
            if explicit.steps is not None and explicit.where is None:
                self.schedule.check(explicit.steps)
            most = self._positions(explicit)
            explicit.runs[key] = Runs(
                self.options.max_runs, most, model.runs.counts, vouched=True, weighs=most > 0,
                weights=explicit.weights, steps_known=explicit.steps,
            )  # fmt: skip
        return explicit.runs[key]

    def _take_in(self, model: Model, record: Record, read: Sequence[Tensor]) -> None:
        """What a call left, now that it is on the CPU."""
        if record not in model.unread:
            return  # another thread was first
        model.unread.remove(record)
        rest, glimpse = iter(read), record.glimpse
        values = [next(rest) for _ in glimpse.values]
        answers = [next(rest) for _ in glimpse.answers]
        for each in record.evaluations:
            if values and not each.step.sample.values:
                each.step.sample = replace(
                    each.step.sample, values=tuple(part[each.index] for part in values)
                )
            if answers:
                answered(each, tuple(part[each.index] for part in answers), glimpse.box)
        if record.pending:
            self._judge(model.counters, record, list(rest))
        record.glimpse, record.pending, record.later = Glimpse(), [], None

    def _judge(self, counters: Counters, record: Record, pending: Sequence[Tensor]) -> None:
        """What a computed step said of how well its run can be predicted."""
        if record.carried is None:
            return
        signals = judge([each.double() for each in pending])
        streams = tuple(
            replace(each, moments=each.moments.cpu().double()) for each in record.carried.streams
        )
        record.carried = replace(record.carried, streams=streams)
        if record.known < 2:
            # On a run's first step there was nothing to predict from: its error means nothing.
            signals = replace(signals, turn=0.0, error=0.0)
        else:
            counters.last_error = signals.error
        gate = self.options.stability_gate
        trusted = bool(
            rules.trusted(record.known, signals.finite, signals.error, self.options.max_error)
        )
        gated = trusted and gate is not None and not gate.allows(signals)
        record.why_not = "gated" if gated else "" if trusted else "untrusted"
        record.carried = replace(record.carried, trusted=not record.why_not)
        if not signals.finite:
            counters.nonfinite_steps += 1
            record.carried = record.carried.forget_newest()

    # Deciding

    def _plan(
        self, model: Model, runs: Runs, inputs: Sequence[Any], seen: Seen, trial: Trial | None
    ) -> _Plan:
        counters = model.counters
        call = self.reader.call(inputs, seen)
        placed = runs.locate(call)
        now = rules.sample_times(seen.times, self._size(self.state.batch, inputs))
        sources = [_source(each, model.epoch) for each in placed]
        carried, fresh = self._carried(sources, now, inputs)
        begun = [
            each.step.depth if each.before is None or index in fresh else each.before.begun
            for index, each in enumerate(placed)
        ]
        forecast, steps, course = self.forecasts.of(
            model, placed[0], now, runs.length(placed[0]), trial
        )
        planned = bool(fresh) or any(
            forecast.schedule.computes(
                each.step.depth, _last(each) - 1, runs.length(each) or steps, own
            )
            for each, own in _alike(zip(placed, begun, strict=True))
        )
        compute = bool(rules.decide(carried, planned))
        if all(each.repeats for each in placed):
            counters.repeated_steps += 1
        counters.full_steps += compute
        counters.predicted_steps += not compute
        if not all(each.repeats for each in placed):
            if compute and not planned:
                why = {each.before.record.why_not for each in placed if each.before is not None}
                counters.gated_steps += "untrusted" not in why
                counters.untrusted_steps += "untrusted" in why
            blind = not runs.vouched and self.reader.blind(inputs)
            dropped = any(
                each.before is not None and source is None
                for each, source in zip(placed, sources, strict=True)
            )
            reasons = {each.root for each in placed} | ({Root.DROPPED} if dropped else set())
            for why_root in {Root.BLIND} if blind else reasons - {""}:
                counters.roots[why_root] = counters.roots.get(why_root, 0) + 1
        remaining = torch.tensor(_remaining(placed[0], steps), dtype=now.dtype)
        streams = rules.arguments(forecast.predictors, carried, now, remaining)
        left = _left(runs, placed, steps) if compute and carried.answers else []
        return _Plan(
            runs, model.epoch, call, placed, compute, carried, fresh, begun, left,
            forecast.correction, course, now, streams,
        )  # fmt: skip

    def _carried(
        self, sources: Sequence[tuple[Record, int] | None], now: Tensor, inputs: Sequence[Any]
    ) -> tuple[Carried, list[int]]:
        """The state that a call continues, and the samples that have none."""
        records = {id(source[0]): source[0] for source in sources if source is not None}
        if len(records) == 1:
            (record,) = records.values()
            whole = [source[1] for source in sources if source is not None]
            same = whole == list(range(len(record.evaluations))) and len(whole) == len(sources)
            if same and record.carried is not None:
                return record.carried, []
        blank = [self._blank(stream, inputs) for stream in self.state.streams]
        begun = rules.begin(self.state.predictor.history, now, blank)
        apart = len(now) == len(sources) and all(
            self._size(stream.shape[0], inputs) == len(sources) for stream in self.state.streams
        )
        if not records or not apart:
            return begun, list(range(len(sources)))
        fresh = [index for index, source in enumerate(sources) if source is None]
        parts = [
            (record.carried, [(place, source[1]) for place, source in enumerate(sources)
                              if source is not None and source[0] is record])
            for record in records.values() if record.carried is not None
        ]  # fmt: skip
        return gathered(begun, parts), fresh

    # Executing and recording

    def _give_back(self, plan: _Plan, results: list[Any]) -> tuple[tuple[CarriedAnswer, ...], bool]:
        """Correct the results that the next sample is made of. What is owed to them after that, and
        whether any was corrected."""
        batch = len(plan.now)
        places = [
            place for place in dict.fromkeys(self.state.clock.answers)
            if len(results[place]) == batch == len(plan.placed)
        ]  # fmt: skip
        if not self.options.correction or not places:
            return (), False
        weight = torch.tensor([each.weight for each in plan.placed], dtype=torch.float64)
        answers, before = [results[place] for place in places], plan.carried.answers
        if not plan.compute:
            pairs = zip(before, answers, strict=False)  # nothing before: nothing to go by
            return tuple(rules.owed_more(*each, plan.now, weight) for each in pairs), False
        owing = any(bool(rules.owing(each, plan.now, weight).any()) for each in before)
        if owing:
            shares = [rules.share_given_back(plan.correction, each) for each in plan.left]
            share = torch.tensor(shares, dtype=torch.float64)
            for place, each, answer in zip(places, before, answers, strict=True):
                results[place] = rules.given_back(each, answer, plan.now, weight, share)
        return tuple(rules.nothing_owed(each, plan.now) for each in answers), owing

    def _size(self, size: Any, inputs: Sequence[Any]) -> int:
        def symbol(name: str) -> int:
            index, dim = self.symbols[name]
            return int(inputs[index] if dim is None else inputs[index].shape[dim])

        return evaluate(size_of(size), symbol)

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

    def _record(self, plan: _Plan, inputs: Sequence[Any], results: list[Any]) -> Record:
        """What a call leaves. Gives back, in its results, what was missed before it."""
        state = self.state.unpack(results[self.outputs :])
        carried = rules.record(
            plan.carried, self.state.predictor, plan.compute, True, plan.now, state
        )
        answers, corrected = self._give_back(plan, results)
        carried = replace(carried, answers=answers)
        if plan.fresh and plan.carried.known:
            carried = begun_anew(carried, plan.fresh)
        glimpse = self.reader.glimpse(inputs, results, plan.runs.positions)
        pending = [each.moments for each in state] if plan.compute else []
        known = int(carried.known)
        return Record(carried, known, plan.epoch, glimpse, pending, corrected, plan.course)

    def _bound(self, runs: Runs, newest: Record) -> None:
        """Drop the state that was not used for longest, where all of it takes too much."""
        limit = self.options.max_state_bytes
        if limit is None:
            limit = device_memory(self.state.streams[0].device) // SHARE
        own = sum(each.nbytes for each in newest.held().values())
        if own * len(runs.records) <= limit:  # mostly; others share tensors with it besides
            return
        for known in list(runs.records.values()):
            if state_bytes(runs) <= limit:
                return
            known.record.carried = None

    def _release(self, plan: _Plan, record: Record) -> None:
        """Forget runs that are over; a step after all would be computed."""
        samples = _alike(zip(plan.placed, plan.begun, strict=True))
        ends = [plan.runs.is_over(each) for each, _ in samples]
        if all(over for over, _ in ends):
            for step in {each.step for each in record.evaluations}:
                plan.runs.end(step, all(certain for _, certain in ends))


def _alike(samples: Iterable[tuple[Placed, int]]) -> list[tuple[Placed, int]]:
    """One of those that are at the same point of a run, with the step that its state begins at."""
    return list(
        {
            (each.step.run, each.step.depth, each.times, _last(each), begun): (each, begun)
            for each, begun in samples
        }.values()
    )


def _source(placed: Placed, epoch: int) -> tuple[Record, int] | None:
    """Where the state of a sample lies, if it is there and of the weights as they are now."""
    if placed.before is None:
        return None
    record = placed.before.record
    if record.carried is None or record.epoch != epoch:
        return None
    return record, placed.before.index


def _last(placed: Placed) -> int:
    return 0 if placed.before is None else placed.before.last


def _left(runs: Runs, placed: Sequence[Placed], steps: int | None) -> list[int]:
    """How many steps are left of each sample's run, this one included; 0 where that is unknown.
    steps: of a run whose length does not show yet."""
    known: dict[Any, int] = {}  # mostly all samples of a batch are at the same point of one run
    for each in placed:
        key = each.step.run, each.step.depth, each.times
        if key not in known:
            known[key] = max((runs.length(each) or steps or 0) - each.step.depth, 0)
    return [known[each.step.run, each.step.depth, each.times] for each in placed]


def _remaining(placed: Placed, steps: int | None) -> float:
    depth, times = placed.step.depth, placed.times
    if steps:
        return max(0.0, 1 - depth / steps)
    return 1.0 if depth == 0 else abs(times[-1] / times[0]) if times[0] else 0.0


def graphs_of(parameters: frozenset[int]) -> list[tuple[PadeGraph, Model]]:
    """The graphs and per-model records that belong to a model, by its parameters' ids."""
    found = []
    for graph in sorted(_graphs, key=lambda each: each.number):
        for model in list(graph.models.values()):
            held = {id(each) for ref in model.held if (each := ref()) is not None}
            if model.owner() is not None and held <= parameters:
                found.append((graph, model))
    return found
