"""Sampling runs: which run a call belongs to, and the state that each run owns.

A compiled graph sees single calls. Which sampling run (trajectory) a call continues is read from
its inputs, in this order:

1. Conditions (prompts, labels, masks; everything that is neither time nor sample) are constant
   during a run: calls with other conditions belong to other runs. That separates the conditional
   from the unconditional call, and requests with different prompts.
2. The sample changes only a little from one step to the next, while two samples from different
   noise are far apart: among runs with equal conditions, the nearest sample wins, if it is near.
3. The time moves in one direction. If it goes back, a new run has begun.

A doubtful call starts a new run, which means that its step is computed: a wrong guess costs time
and shows in the counters, never in the picture.
"""

from __future__ import annotations

import contextlib
import contextvars
import enum
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...kernels.predictors import Signals
from ...passes.pade.rules import Carried
from ...passes.pade.schedule import estimate_steps

__all__ = ["Call", "Explicit", "Relation", "Run", "Runs", "current_explicit",
           "digest", "distance", "enter_explicit", "sketch"]  # fmt: skip

# Relative distance between the samples of two calls above which they are of different runs.
# Measured: below 0.35 between steps of one run (6 steps and more), about 1.4 between two noises.
NEAR = 0.6
SKETCH = 512  # values of a sample that are compared
SUSPICIONS = 3  # steps after which a condition that always changes counts as varying
KNOWN_LENGTHS = 32  # finished schedules that are remembered, to know a run's length beforehand


def digest(tensor: Tensor) -> int:
    """A 64-bit hash of a tensor's bits, sensitive to their order."""
    flat = tensor.detach().contiguous().flatten()
    if flat.is_complex():
        flat = torch.view_as_real(flat).flatten()
    if flat.dtype == torch.bool:
        flat = flat.to(torch.uint8)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = flat.view(integers[flat.element_size()]).to(torch.int64)
    # A sum of bits times odd numbers, modulo 2^64 (integer overflow wraps).
    weights = torch.arange(1, 2 * bits.numel(), 2, device=bits.device) * -7046029254386353131
    return int((bits * weights).sum())


def sketch(tensors: Sequence[Tensor]) -> Tensor:
    """A few evenly spread values of the samples, as float32 on the CPU."""
    parts = []
    for tensor in tensors:
        flat = tensor.detach().flatten()
        stride = max(1, flat.numel() // SKETCH)
        parts.append(flat[::stride].float())
    return torch.cat(parts).cpu() if parts else torch.zeros(0)


def distance(left: Tensor, right: Tensor) -> float:
    """Relative distance of two sketches; infinite between different shapes or broken values."""
    if left.shape != right.shape:
        return float("inf")
    size = max(float(left.norm()), float(right.norm()))
    if size == 0:
        return 0.0
    relative = float((left - right).norm()) / size
    return relative if relative == relative else float("inf")


@dataclass(frozen=True)
class Call:
    """What one call says about where it belongs.

    conditions: hashes of what is constant during a run, in a fixed order (first: the shapes).
    time: the timestep, as one number for the batch.
    sample: sketch of the noisy sample.
    """

    conditions: tuple[object, ...]
    time: float
    sample: Tensor


class Relation(enum.Enum):
    """How a call relates to a run."""

    REPEAT = "the same step again"
    NEXT = "the next step"
    RESTART = "the first step of a new run in its place"
    FOREIGN = "another run"


@dataclass
class Run:
    """One sampling run and its state.

    carried: what the rules carry from step to step; None before the first step and after the last.
    pending: moments of the newest computed step, on its device, that have not been read yet.
    signals: what they said once they were; why_not: why the run is not trusted by them.
    """

    conditions: tuple[object, ...]
    sample: Tensor
    times: list[float] = field(default_factory=list)
    steps: int | None = None
    step: int = -1
    computing: bool = True
    carried: Carried | None = None
    pending: list[Tensor] | None = None
    signals: Signals | None = None
    why_not: str = ""

    def relate(self, call: Call, single: bool) -> tuple[Relation, float]:
        """How `call` relates to this run, and the distance of its sample.

        single: the caller vouches that there is one run only, so the time may also go back.
        """
        apart = distance(self.sample, call.sample)
        now, time = self.times[-1], call.time
        if time == now:
            if apart == 0.0:
                return Relation.REPEAT, apart
            # Heun-like solvers evaluate twice at one time, though not at the first.
            again = apart <= NEAR and self.step > 0
            return (Relation.NEXT if again else Relation.FOREIGN), apart
        direction = self.times[-1] - self.times[0]
        back = direction * (time - now) < 0
        if back and not single:
            return Relation.RESTART, apart
        return (Relation.NEXT if apart <= NEAR else Relation.FOREIGN), apart

    def advance(self, call: Call) -> None:
        """Take `call` as this run's next step."""
        self.step += 1
        self.times.append(call.time)
        self.sample = call.sample
        self.conditions = call.conditions

    @property
    def known(self) -> int:
        """How many residuals there are to predict from."""
        return 0 if self.carried is None else int(self.carried.known)

    def release(self) -> None:
        """Free the state; the run can still be recognised."""
        self.carried = self.pending = None

    def bytes(self) -> int:
        """Bytes of state held."""
        if self.carried is None or not self.known:
            return 0
        held = [
            tensor for stream in self.carried.streams
            for tensor in (*stream.residuals, stream.previous) if tensor is not None
        ]  # fmt: skip
        # Entries beyond the known ones are the oldest one again.
        return sum(each.nbytes for each in {id(tensor): tensor for tensor in held}.values())


@dataclass
class Runs:
    """The live runs of one compiled graph, longest unused first."""

    limit: int
    steps: int | None = None  # known beforehand (accel.trajectory)
    single: bool = False
    live: OrderedDict[int, Run] = field(default_factory=OrderedDict)
    lengths: OrderedDict[tuple[float, ...], int] = field(default_factory=OrderedDict)
    started: int = 0
    unmatched: int = 0
    varying: set[int] = field(default_factory=set)
    confirmed: bool = False
    suspicions: int = 0

    def locate(self, call: Call) -> tuple[Run, Relation]:
        """The run that a call belongs to, advanced to it; a new one where none fits."""
        related = []
        for number, run in self.live.items():
            if not self._changed(run, call):
                relation, apart = run.relate(call, self.single)
                related.append((relation, apart, number, run))
        if not related:
            self._suspect(call)
        preference = [Relation.REPEAT, Relation.NEXT, Relation.RESTART]
        fitting = [entry for entry in related if entry[0] in preference]
        if fitting:
            relation, _, number, run = min(fitting, key=lambda e: (preference.index(e[0]), e[1]))
            if relation is not Relation.RESTART:
                self.live.move_to_end(number)
                if relation is Relation.NEXT:
                    self.confirmed = True
                    run.advance(call)
                    self._know_length(run)
                return run, relation
            self._finish(run)
            del self.live[number]
        elif related:
            self.unmatched += 1
        run = Run(conditions=call.conditions, sample=call.sample, steps=self.steps)
        run.advance(call)
        self.live[self.started] = run
        self.started += 1
        while len(self.live) > self.limit:
            self._finish(self.live.popitem(last=False)[1])
        return run, Relation.NEXT

    def _changed(self, run: Run, call: Call) -> set[int]:
        """The conditions in which a call differs from a run, but for those known to vary."""
        pairs = zip(run.conditions, call.conditions, strict=True)
        different = {index for index, (old, new) in enumerate(pairs) if old != new}
        return different - self.varying

    def _suspect(self, call: Call) -> None:
        """Learn that a condition varies from step to step (a ControlNet's output, say).

        The evidence: several calls in a row that continue the newest run in time and sample, and
        no call ever, so far, that continued a run with all its conditions unchanged. Guidance in
        two calls never gives it: its prompts come back on the next step.
        """
        if self.confirmed or not self.live:
            return
        newest = next(reversed(self.live.values()))
        relation, apart = newest.relate(call, self.single)
        moved = newest.times[-1] != call.time and apart > 0
        changed = self._changed(newest, call)
        if relation is Relation.NEXT and moved and 0 not in changed:
            self.suspicions += 1
            if self.suspicions >= SUSPICIONS:
                self.varying |= changed
        else:
            self.suspicions = 0

    def _know_length(self, run: Run) -> None:
        if self.steps is None:
            estimate = estimate_steps(run.times)
            known = self.lengths.get(tuple(run.times[:2]), 0)
            # A run that was cut off says nothing of the next one's length.
            fits = known > run.step and (estimate is None or abs(known - estimate) < known / 4)
            run.steps = known if fits else estimate

    def _finish(self, run: Run) -> None:
        """Remember how long a run was, for the next one that starts at the same times."""
        if run.step >= 2:
            self.lengths[tuple(run.times[:2])] = run.step + 1
            while len(self.lengths) > KNOWN_LENGTHS:
                self.lengths.popitem(last=False)

    def bytes(self) -> int:
        """Bytes of state held by all runs."""
        return sum(run.bytes() for run in self.live.values())


@dataclass
class Explicit:
    """An `accel.trajectory(...)` block: state of its own for each compiled graph."""

    parameters: frozenset[int]
    steps: int | None
    runs: dict[int, Runs] = field(default_factory=dict)


_explicit: contextvars.ContextVar[tuple[Explicit, ...]] = contextvars.ContextVar(
    "accel_trajectory", default=()
)


def current_explicit(parameter: int) -> Explicit | None:
    """The innermost `accel.trajectory` block of a model, known by the id of one parameter."""
    for explicit in reversed(_explicit.get()):
        if parameter in explicit.parameters:
            return explicit
    return None


@contextlib.contextmanager
def enter_explicit(explicit: Explicit) -> Iterator[Explicit]:
    """Make `explicit` current in this thread or task; its state is freed on exit."""
    token = _explicit.set((*_explicit.get(), explicit))
    try:
        yield explicit
    finally:
        _explicit.reset(token)
        explicit.runs.clear()
