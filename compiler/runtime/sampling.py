"""The callable that Dynamo gets back: a rewritten graph together with the state it threads."""

from __future__ import annotations

import functools
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...kernels.predictors import judge
from ...passes import PadePass
from ...passes.pade import StackState, rules
from ...passes.pade.rules import Carried, CarriedStream
from ...passes.pade.state import StreamInputs, StreamState
from .batches import begun_anew, gathered
from .digest import named, on_host, parts_of
from .fingerprint import Fingerprint
from .provenance import positions
from .runs import Call, Evaluation, Placed, Root, Runs, Sample, answered
from .sizes import evaluate, size_of
from .trajectory import Explicit, Moment, told, vouched

__all__ = ["Counters", "PadeGraph", "graphs_of", "state_bytes"]

MOST, FEWEST, TOGETHER = 2048, 128, 8192  # positions of a sample that are fitted, and of a batch
HELD = 2**16  # bytes of a tensor up to which it is read at every call, whatever torch counts
REMEMBERED = 64  # hashes of larger tensors
SHARE = 20  # one part of a device's memory that state may take

Places = tuple[Tensor, Tensor, torch.Size]  # in a sample, in its output, and that one's shape
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
    weight_changes: int = 0
    host_reads: int = 0
    roots: dict[str, int] = field(default_factory=dict)
    last_error: float = float("nan")


@dataclass(eq=False)
class Record:
    """What a call has left. carried: the state after it; None where that was dropped.

    known: how many residuals there are to predict from. box: what positions lie in.
    values, answers: its samples and the model's outputs at some of their positions, [batch,
    positions] for each part; pending: moments of a computed step. Until `read` they are on their
    device.
    """

    carried: Carried | None
    values: list[Tensor]
    answers: list[Tensor]
    pending: list[Tensor]
    known: int
    box: tuple[Any, ...] = ()
    evaluations: list[Evaluation] = field(default_factory=list)
    why_not: str = ""

    @property
    def left(self) -> list[Tensor]:
        """What is to be read of it."""
        return [*self.values, *self.answers, *self.pending]

    def held(self) -> dict[int, Tensor]:
        """The tensors of its state. Entries beyond the known ones are the oldest one again."""
        if self.carried is None:
            return {}
        return {
            id(tensor): tensor for stream in self.carried.streams
            for tensor in (*stream.residuals, stream.previous) if tensor is not None
        }  # fmt: skip


@dataclass(eq=False)
class _Model:
    """The runs and counters of one model. Dynamo may run several models by one graph."""

    owner: weakref.ref[Any]
    runs: Runs
    counters: Counters = field(default_factory=Counters)
    hashes: dict[int, tuple[weakref.ref[Tensor], int, list[bytes]]] = field(default_factory=dict)
    weights: Fingerprint | None = None
    unread: list[Record] = field(default_factory=list)


@dataclass
class _Seen:
    """What was read of a call, on the CPU. values: of each part, [batch, positions]. keys: hashes
    of each sample; conditions: one entry for all samples or one for each. left: of earlier calls.
    depth: how many steps the run had before, where that was said.
    """

    values: list[Tensor]
    keys: list[bytes]
    times: list[Tensor]
    conditions: list[list[Any]]
    left: list[tuple[Record, list[Tensor]]]
    depth: int | None = None


@dataclass(frozen=True)
class _Plan:
    """What was decided for one call. fresh: samples that have no state yet."""

    runs: Runs
    call: Call
    placed: list[Placed]
    compute: bool
    carried: Carried
    fresh: list[int]
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
        self.schedule = options.plan()
        self.models: dict[frozenset[int], _Model] = {}
        self.lock = threading.Lock()
        self.symbols = symbols
        self.owned = tuple(owned)
        self.places: dict[Any, Places | None] = {}
        _graphs.add(self)

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        said = told(id(inputs[self.owned[0]]) if self.owned else id(self))
        with self.lock:
            model = self._model(inputs)
            unread = list(model.unread)
        if said is not None and said.moment is not None:
            seen = self._told(said.run, said.moment, inputs)
        else:
            seen = self._read(model, unread, inputs)
        if said is not None and said.branch is not None:
            seen.conditions = []  # the name says it
        with self.lock:
            for record, read in seen.left:
                self._take_in(model, record, read)
            runs = model.runs if said is None else self._vouched(said.run, said.branch)
            plan = self._plan(model, runs, inputs, seen)
        packed = self.state.pack(torch.tensor(plan.compute), plan.streams)
        results = self.function(*inputs, *packed)
        record = self._record(plan, inputs, results)
        with self.lock:
            record.evaluations = plan.runs.add(plan.call, plan.placed, record)
            for each, placed in zip(record.evaluations, plan.placed, strict=True):
                each.last = each.step.depth + 1 if plan.compute else _last(placed)
            if record.left:
                model.unread.append(record)
            if all(each.device.type == "cpu" for each in record.left):
                self._take_in(model, record, record.left)
            self._bound(plan.runs, record)
            self._release(plan, record)
        return tuple(results[: self.outputs])

    # Which model

    def _model(self, inputs: Sequence[Any]) -> _Model:
        weights = [inputs[index] for index in self.owned]
        key = frozenset(map(id, weights)) or frozenset({id(self)})
        owner = weights[0] if weights else self
        model = self.models.get(key)
        if model is None or model.owner() is not owner:
            model = _Model(weakref.ref(owner), Runs(limit=self.options.max_runs))
            self.models[key] = model
            for each in [k for k, m in self.models.items() if m.owner() is None]:
                del self.models[each]
        if not weights:
            return model
        if model.weights is None:
            model.weights = Fingerprint.of(weights)
        elif model.weights.changed(weights):
            # What was computed by other weights is no history of what these compute.
            model.counters.weight_changes += 1
            model.weights = Fingerprint.of(weights)
            model.runs.drop_states()
            for said in vouched(self.number):
                said.drop_states()
        return model

    def _vouched(self, explicit: Explicit, branch: str | None) -> Runs:
        """The runs of an explicit one: each named branch has its own."""
        key = self.number, branch
        if key not in explicit.runs:
            if explicit.steps is not None and explicit.where is None:
                self.schedule.check(explicit.steps)
            explicit.runs[key] = Runs(
                limit=self.options.max_runs, vouched=True, steps_known=explicit.steps
            )
        return explicit.runs[key]

    # What a call says

    def _read(self, model: _Model, unread: Sequence[Record], inputs: Sequence[Any]) -> _Seen:
        """What a call says, and what earlier ones left; a device is waited for once."""
        clock = self.state.clock
        latents = [inputs[index] for index in clock.latents]
        batch = len(latents[0]) if latents else 1
        places = [self.places.get(_form(each)) for each in latents]
        values = [
            each.detach().flatten(1)[:, place[0]]
            for each, place in zip(latents, places, strict=True) if place is not None
        ]  # fmt: skip
        keys = [parts_of(each) for each in latents]
        conditions: list[Any] = []
        hashed: list[tuple[int, Tensor, Tensor]] = []
        for index in clock.conditions:
            value = inputs[index]
            if not isinstance(value, Tensor):
                conditions.append([value])
                continue
            known = self._remembered(model, value)
            if known is None:
                rows = value if value.dim() and len(value) == batch > 1 else value[None]
                hashed.append((len(conditions), value, rows))
            conditions.append(known)
        parts = [parts_of(rows) for _, _, rows in hashed]
        times = [torch.as_tensor(inputs[index]).detach() for index in clock.times]
        # A record is read as a whole, so that two threads that read the same one agree.
        left = [(record, record.left) for record in unread]
        everything = [*values, *keys, *parts, *times, *(each for _, some in left for each in some)]
        model.counters.host_reads += any(each.device.type != "cpu" for each in everything)
        read = iter(on_host(everything))
        seen_values = [next(read) for _ in values]
        seen_keys = [named(latent, next(read)) for latent in latents]
        for place, value, rows in hashed:
            conditions[place] = named(rows, next(read))
            self._remember(model, value, conditions[place])
        seen_times = [next(read) for _ in times]
        return _Seen(
            seen_values if len(seen_values) == len(latents) else [],
            # Where no sample is known, nothing tells calls apart, so each is a run of its own.
            [b"".join(each) for each in zip(*seen_keys, strict=True)] or [_unique()],
            seen_times,
            conditions,
            [(record, [next(read) for _ in some]) for record, some in left],
        )

    def _told(self, run: Explicit, moment: Moment, inputs: Sequence[Any]) -> _Seen:
        """What a call says where a pipeline says the step and its time: no tensor is read.

        Conditions are where they lie: what is kept alive and unchanged there is the same.
        """
        clock = self.state.clock
        batch = len(inputs[clock.latents[0]]) if clock.latents else 1
        values = [inputs[index] for index in clock.conditions]
        run.keep(moment.step, [each for each in values if isinstance(each, Tensor)])
        conditions = [[_place(each) if isinstance(each, Tensor) else each] for each in values]
        time = torch.tensor([moment.time], dtype=torch.float64)
        keys = [f"{moment.step} {index}".encode() for index in range(batch)]
        return _Seen([], keys, [time], conditions, [], moment.step)

    def _remembered(self, model: _Model, tensor: Tensor) -> list[bytes] | None:
        """Hashes of a large tensor that is unchanged, as far as torch counts."""
        if tensor.nbytes <= HELD or tensor.is_inference():
            return None
        known = model.hashes.get(id(tensor))
        same = known is not None and known[0]() is tensor and known[1] == tensor._version
        return known[2] if known is not None and same else None

    def _remember(self, model: _Model, tensor: Tensor, hashes: list[bytes]) -> None:
        if tensor.nbytes > HELD and not tensor.is_inference():
            if len(model.hashes) >= REMEMBERED:
                model.hashes.clear()
            model.hashes[id(tensor)] = weakref.ref(tensor), tensor._version, hashes

    def _take_in(self, model: _Model, record: Record, read: Sequence[Tensor]) -> None:
        """What a call left, now that it is on the CPU."""
        if record not in model.unread:
            return  # another thread was first
        model.unread.remove(record)
        parts = len(record.answers)
        record.values = list(read[: len(record.values)])
        answers = list(read[len(record.values) : len(record.values) + parts])
        pending = list(read[len(record.values) + parts :])
        for each in record.evaluations:
            if record.values and not each.step.sample.values:
                each.step.sample = replace(
                    each.step.sample, values=tuple(part[each.index] for part in record.values)
                )
            if answers:
                answered(each, tuple(part[each.index] for part in answers), record.box)
        if pending:
            self._judge(model.counters, record, pending)
        record.values, record.answers, record.pending = [], [], []

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

    def _call(self, inputs: Sequence[Any], seen: _Seen) -> Call:
        clock = self.state.clock
        latents = [inputs[index] for index in clock.latents]
        batch = len(latents[0]) if latents else 1
        times = [rules.sample_times([each], batch).tolist() for each in seen.times]
        columns = [*seen.conditions, *times]
        conditions = [
            tuple(column[index if len(column) > 1 else 0] for column in columns)
            for index in range(batch)
        ]
        samples = [
            Sample(tuple(part[index] for part in seen.values), key)
            for index, key in enumerate(seen.keys)
        ]
        first = len(seen.conditions)
        return Call(
            tuple(_form(latent) for latent in latents),
            samples,
            conditions,
            frozenset(range(first, first + len(times))),
            _coarsest([each.dtype for each in latents]),
            seen.depth,
            max(map(_rounded, seen.times), default=(0.0, 0.0)),
        )

    # Deciding

    def _plan(self, model: _Model, runs: Runs, inputs: Sequence[Any], seen: _Seen) -> _Plan:
        counters = model.counters
        call = self._call(inputs, seen)
        placed = runs.locate(call)
        now = rules.sample_times(seen.times, self._size(self.state.batch, inputs))
        carried, fresh = self._carried(placed, now, inputs)
        planned = bool(fresh) or any(
            self.schedule.computes(each.step.depth, _last(each) - 1, runs.length(each))
            for each in _alike(placed)
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
            blind = not self.state.clock.latents or None in self.places.values()
            dropped = [each for each in placed if each.before is not None and not _source(each)]
            reasons = {each.root for each in placed} | {Root.DROPPED for _ in dropped}
            for why_root in {Root.BLIND} if blind else reasons - {""}:
                counters.roots[why_root] = counters.roots.get(why_root, 0) + 1
        remaining = torch.tensor(_remaining(placed[0], runs.length(placed[0])), dtype=now.dtype)
        streams = rules.arguments(self.state.predictor, carried, now, remaining)
        return _Plan(runs, call, placed, compute, carried, fresh, now, streams)

    def _carried(
        self, placed: Sequence[Placed], now: Tensor, inputs: Sequence[Any]
    ) -> tuple[Carried, list[int]]:
        """The state that a call continues, and the samples that have none."""
        sources = [_source(each) for each in placed]
        records = {id(source[0]): source[0] for source in sources if source is not None}
        if len(records) == 1:
            (record,) = records.values()
            whole = [source[1] for source in sources if source is not None]
            same = whole == list(range(len(record.evaluations))) and len(whole) == len(placed)
            if same and record.carried is not None:
                return record.carried, []
        blank = [self._blank(stream, inputs) for stream in self.state.streams]
        begun = rules.begin(self.state.predictor.history, now, blank)
        apart = len(now) == len(placed) and all(
            self._size(stream.shape[0], inputs) == len(placed) for stream in self.state.streams
        )
        if not records or not apart:
            return begun, list(range(len(placed)))
        fresh = [index for index, source in enumerate(sources) if source is None]
        parts = [
            (record.carried, [(place, source[1]) for place, source in enumerate(sources)
                              if source is not None and source[0] is record])
            for record in records.values() if record.carried is not None
        ]  # fmt: skip
        return gathered(begun, parts), fresh

    # Executing and recording

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

    def _record(self, plan: _Plan, inputs: Sequence[Any], results: Sequence[Any]) -> Record:
        state = self.state.unpack(results[self.outputs :])
        carried = rules.record(
            plan.carried, self.state.predictor, plan.compute, True, plan.now, state
        )
        if plan.fresh and plan.carried.known:
            carried = begun_anew(carried, plan.fresh)
        values, answers, box = [], [], []
        clock = self.state.clock
        for index, answer_index in zip(clock.latents, clock.answers, strict=True):
            latent, answer = inputs[index].detach(), results[answer_index].detach()
            place = self._places(latent, answer)
            if place is not None:
                values.append(latent.flatten(1)[:, place[0]])
                answers.append(answer.flatten(1)[:, place[1]])
                box.append(tuple(map(min, latent.shape[1:], answer.shape[1:])))
        if len(answers) < len(clock.latents) or plan.runs.vouched:
            values = answers = []
        pending = [each.moments for each in state] if plan.compute else []
        return Record(carried, values, answers, pending, int(carried.known), tuple(box))

    def _places(self, latent: Tensor, answer: Tensor) -> Places | None:
        """Positions in a sample and in its output, both flattened; None where they do not fit."""
        form = _form(latent)
        known = self.places.get(form)
        if known is not None and known[2] != answer.shape:
            return None  # results of other sizes are not those that were looked at
        if form not in self.places:
            box = [min(one, other) for one, other in zip(latent.shape[1:], answer.shape[1:],
                                                         strict=False)]  # fmt: skip
            fits = latent.dim() == answer.dim() and len(latent) == len(answer) and box
            self.places[form] = None
            if fits:
                batch = max(len(latent), 1)
                wanted = min(max(TOGETHER // batch, FEWEST), MOST)
                chosen = positions(box, wanted)
                self.places[form] = (
                    _flat(chosen, latent.shape[1:]).to(latent.device),
                    _flat(chosen, answer.shape[1:]).to(answer.device),
                    answer.shape,
                )
        return self.places[form]

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
        ends = [plan.runs.is_over(each) for each in _alike(plan.placed)]
        if all(over for over, _ in ends):
            for step in {each.step for each in record.evaluations}:
                plan.runs.end(step, all(certain for _, certain in ends))


def _unique() -> bytes:
    return f"call {next(_numbers)}".encode()


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.device


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies, and how often torch has counted a change of it."""
    version = None if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, version


def _coarsest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    floating = [each for each in dtypes if each.is_floating_point]
    return max(floating, key=lambda each: torch.finfo(each).eps, default=torch.float32)


def _rounded(times: Tensor) -> tuple[float, float]:
    """How far times may be from what they were before they were rounded: as a part, and in all."""
    if not times.is_floating_point():
        return 0.0, 0.5
    error = torch.finfo(times.dtype).eps / 2
    return (error if error > 1e-5 else 0.0), 0.0


def _flat(places: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Positions, given in each dimension, in a flattened tensor."""
    flat = torch.zeros_like(places[0])
    for place, size in zip(places, shape, strict=True):
        flat = flat * size + place
    return flat


def _alike(placed: Sequence[Placed]) -> list[Placed]:
    """One of those that are at the same point of a run."""
    return list(
        {
            (each.step.run, each.step.depth, each.times, _last(each)): each for each in placed
        }.values()
    )


def _source(placed: Placed) -> tuple[Record, int] | None:
    if placed.before is None or placed.before.record.carried is None:
        return None
    return placed.before.record, placed.before.index


def _last(placed: Placed) -> int:
    return 0 if placed.before is None else placed.before.last


def _remaining(placed: Placed, steps: int | None) -> float:
    depth, times = placed.step.depth, placed.times
    if steps:
        return max(0.0, 1 - depth / steps)
    return 1.0 if depth == 0 else abs(times[-1] / times[0]) if times[0] else 0.0


def graphs_of(parameters: frozenset[int]) -> list[tuple[PadeGraph, _Model]]:
    """The graphs and per-model records that belong to a model, by its parameters' ids."""
    found = []
    for graph in sorted(_graphs, key=lambda each: each.number):
        for key, model in list(graph.models.items()):
            if model.owner() is not None and key <= parameters:
                found.append((graph, model))
    return found


@functools.cache
def device_memory(device: torch.device) -> int:
    """Bytes of memory that a device has; of the host, where the device does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def state_bytes(runs: Runs) -> int:
    """Bytes of state that all runs hold."""
    held: dict[int, Tensor] = {}
    for known in runs.records.values():
        held |= known.record.held()
    return sum(each.nbytes for each in held.values())
