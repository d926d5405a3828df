"""Sampling runs as trees: each call is a child of the step that provably explains its sample.

A *step* is one distinct sample. Calls on it are its *evaluations*: the branches of guidance, and
repeats. What is known of a step never changes, so a run that forks (another guidance, a cancelled
run that goes on, a slot of the batch that was copied) just continues from its ancestor. All of it
is by sample of the batch: each finds its own ancestor.

A call's state comes from the evaluation of its parent that it continues: the one with the same
conditions. Conditions that differ from step to step (a ControlNet's output) are told by the run
itself, from its last two steps; in doubt there is no state, and the call is computed.
"""

from __future__ import annotations

import functools
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...passes.pade.schedule import estimate_steps, fits_times
from .provenance import FINE, REACH, fit, limits_of, rounding

__all__ = ["Call", "Evaluation", "Placed", "Root", "Runs", "Sample", "Step", "answered"]

MOST_COLUMNS = 12  # of a basis for one step: its sample, and outputs at it
TRIED = 48  # steps that a sample is fitted to at the most
RIVAL = 1.3  # how much more than a rival's a proof may leave
RELATED = 0.05  # the least correlation with what is fitted
KEPT = 16  # calls that are kept for each of `limit`
WITNESSED = 256  # samples whose outputs other models may look at
KNOWN_LENGTHS = 32  # finished schedules that are remembered, to know a run's length beforehand
CHANGING = 0.02  # of a sample's positions, where fewer are unchanged, none is left out for that
FEWEST = 4  # positions that a fit needs beyond three for two columns


@dataclass(frozen=True)
class Sample:
    """One sample of a call: its values at some positions, float64 [P] for each of the model's
    samples (video and audio: two), and a hash of all bits."""

    values: tuple[Tensor, ...]
    key: bytes


@dataclass(frozen=True)
class Call:
    """What a call says about where it belongs. Lists have an entry for each sample of the batch.

    form: what has to be equal within a run: shapes. conditions: hashes and numbers; clock: which
    of them are values of inputs that may be the time. dtype: the coarsest type that samples and
    outputs are rounded to. depth: how many steps its run had before, where the caller says so.
    time_error: how far times may be from what they were before they were
    rounded: as a part of them, and in all.
    """

    form: tuple[Any, ...]
    samples: list[Sample]
    conditions: list[tuple[Any, ...]]
    clock: frozenset[int]
    dtype: torch.dtype
    depth: int | None = None
    time_error: tuple[float, float] = (0.0, 0.0)


class Root:
    """Why a call has no state to continue."""

    NEW = "nothing that is known explains its sample"
    CONDITIONS = "no call on the step before had the same conditions"
    DROPPED = "the state of the step before was dropped: for its age or size, or for other weights"
    BLIND = "no input is recognised as the sample, with an output like it"


@dataclass(eq=False)
class Evaluation:
    """One sample of one call. record: the call's; index: the sample's place in its batch.

    outputs: the model's outputs at the sample's positions, once they have been read.
    before: the evaluation that it continues. changed: which conditions differ from that one's.
    clock: which of the conditions are the time, by this branch's steps so far.
    stateful: whether that one's state was continued, too.
    last: the newest computed step of the branch with this one, counted from 1; 0 for none.
    visits: how often it was made.
    """

    step: Step
    record: Any
    index: int
    conditions: tuple[Any, ...]
    before: Evaluation | None
    changed: frozenset[int]
    clock: frozenset[int]
    stateful: bool = False
    last: int = 0
    visits: int = 1
    outputs: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class Step:
    """A distinct sample. depth: how many steps its run had before; times: of these and its own.
    run: its run's number. children: steps that continue it. ended: runs that came by and are over.
    box: what its positions lie in, once that is known; runs: the number of the `Runs` it is of.
    doubted: whether it may have been the origin of a sample for which that could not be told.
    """

    sample: Sample
    form: tuple[Any, ...]
    parent: Step | None
    depth: int
    run: int
    times: tuple[float, ...] = ()
    evaluations: list[Evaluation] = field(default_factory=list)
    children: int = 0
    ended: int = 0
    box: tuple[Any, ...] = ()
    runs: int = 0
    doubted: bool = False

    def path(self, reach: int = REACH) -> Iterator[Step]:
        """This step and those before it, newest first."""
        step: Step | None = self
        for _ in range(reach):
            if step is None:
                return
            yield step
            step = step.parent


@dataclass(frozen=True)
class Placed:
    """Where one sample of a call belongs. step: new, or one that is known. before: what its state
    comes from; None where there is none, and then `root` says why. link: the evaluation that it
    follows, with or without state. times: of the run's steps up to this one; error: see `Call`.
    repeats: whether there was an evaluation with all the same."""

    step: Step
    before: Evaluation | None
    root: str
    link: Evaluation | None
    changed: frozenset[int]
    clock: frozenset[int]
    times: tuple[float, ...]
    error: tuple[float, float]
    repeats: bool = False


@dataclass
class Runs:
    """The steps that one model in one graph has seen, least recently used first.

    limit: calls that nothing has continued yet, whose steps are kept. vouched: whether the caller
        says that all calls are of one run, each on the sample that the one before has led to.
    steps_known: how many steps a run has, where the caller says so.
    lengths: how long runs have become, by their first two times and their numbers.
    over: last steps of runs that seem to be.
    started, forks, siblings, repeats: steps that nothing explained; that continue what something
    else has continued; evaluations beside others of their step; calls with all the same once more.
    largest_accepted, smallest_refused: what fits have left, in expected rounding errors.
    """

    limit: int
    vouched: bool = False
    steps_known: int | None = None
    steps: dict[tuple[Any, ...], Step] = field(default_factory=dict)
    records: OrderedDict[int, _Known] = field(default_factory=OrderedDict)
    lengths: OrderedDict[tuple[float, ...], dict[int, int]] = field(default_factory=OrderedDict)
    number: int = field(default_factory=itertools.count().__next__)
    over: dict[int, Step] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=itertools.count)
    started: int = 0
    forks: int = 0
    siblings: int = 0
    largest_accepted: float = 0.0
    smallest_refused: float = float("inf")

    # Where a call belongs

    def locate(self, call: Call) -> list[Placed]:
        """Where each sample of a call belongs; `add` takes it in."""
        self._begin_again(call)
        found: dict[bytes, Step] = {}
        unknown: dict[bytes, Sample] = {}
        for sample in call.samples:
            known = self.steps.get((call.form, sample.key))
            if known is not None:
                found[sample.key] = known
            else:
                unknown.setdefault(sample.key, sample)
        parents = self._explained(call, list(unknown.values()))
        number = next(self.numbers)
        for sample, parent in zip(unknown.values(), parents, strict=True):
            depth = 0 if parent is None else parent.depth + 1
            depth = depth if call.depth is None else call.depth
            run = number if parent is None else parent.run
            found[sample.key] = Step(sample, call.form, parent, depth, run, runs=self.number)
        return [
            self._placed(call, found[sample.key], conditions)
            for sample, conditions in zip(call.samples, call.conditions, strict=True)
        ]

    def _begin_again(self, call: Call) -> None:
        """Forget runs that are over where a call begins one of them anew, with the same sample."""
        known = (self.steps.get((call.form, sample.key)) for sample in call.samples)
        begun = {step.run for step in known if step is not None and step.parent is None}
        for key in [key for key, last in self.over.items() if last.run in begun]:
            self._forget_path(self.over.pop(key))

    def _placed(self, call: Call, step: Step, conditions: tuple[Any, ...]) -> Placed:
        def placed(
            before: Evaluation | None, root: str, link: Evaluation | None = None,
            changed: frozenset[int] = frozenset(), clock: frozenset[int] = call.clock,
            repeats: bool = False,
        ) -> Placed:  # fmt: skip
            times = step.times or _times(step.parent, link, conditions, clock)
            return Placed(step, before, root, link, changed, clock, times, call.time_error, repeats)

        for known in reversed(step.evaluations):
            if known.conditions == conditions:
                root = "" if known.stateful else Root.NEW
                before = known.before if known.stateful else None
                return placed(before, root, known.before, known.changed, known.clock, True)
        if step.parent is None:
            return placed(None, Root.NEW)
        for earlier in step.parent.path():
            link, changed = _followed(earlier, conditions)
            if link is None:
                continue
            moved, rest = changed & call.clock, changed - call.clock
            # On a run's second step it shows which of the inputs that may be the time are.
            settled = call.clock if link.before is None else link.clock
            clock = moved if link.before is None else link.clock | moved
            certain = moved <= settled and rest <= _varying(link)
            # The same sample at another time is no step of a sampler.
            certain &= not any(
                (found := _differing(each.conditions, conditions)) and found <= settled
                for each in step.evaluations
            )
            return placed(link if certain else None, "" if certain else Root.CONDITIONS, link,
                          changed, clock)  # fmt: skip
        return placed(None, Root.CONDITIONS)

    def _explained(self, call: Call, samples: list[Sample]) -> list[Step | None]:
        """The step that each sample continues, where one provably is."""
        if not samples:
            return []
        if self.vouched:
            newest = next(reversed(self.records.values()), None)
            if newest is None or newest.form != call.form or len(newest.distinct) != len(samples):
                return [None] * len(samples)
            return list(newest.distinct)
        best, coarse = [_Best() for _ in samples], rounding(call.dtype) > FINE
        if not samples[0].values:  # the first call of a form, or one whose sample is not known
            return [None] * len(samples)
        # Mostly a call continues one of the last; its samples are in the same order.
        tried: set[tuple[int, int]] = set()
        for known in reversed(self.records.values()):
            steps = known.distinct
            if known.continued or known.form != call.form or len(steps) != len(samples):
                continue
            pairs = [(index, steps[index]) for index, each in enumerate(best)
                     if not each.sure and (index, id(steps[index])) not in tried]  # fmt: skip
            if not pairs:
                continue
            tried |= {(index, id(step)) for index, step in pairs}
            self._try(call, samples, pairs, best)
        open_ones = [index for index, each in enumerate(best) if not each.sure]
        if open_ones:
            self._try(call, samples, self._related(call, samples, open_ones, tried), best)
        for each in best:
            if coarse and each.step is not None and each.doubtful():
                # Where a run is broken off, what it came from must not be taken up again later.
                for step in (each.step, *(rival for rival, _ in each.rivals)):
                    step.doubted = True
                each.step = None
            if each.step is not None:
                self.largest_accepted = max(self.largest_accepted, each.left)
        return [each.step for each in best]

    def _related(
        self, call: Call, samples: list[Sample], missing: list[int], tried: set[tuple[int, int]]
    ) -> list[tuple[int, Step]]:
        """Pairs of a sample and a step that may explain it: those with something in common."""
        steps = [each for each in self.steps.values() if each.form == call.form]
        if not steps:
            return []
        wanted = torch.stack([_unit(samples[index].values[0]) for index in missing])
        related = torch.zeros(len(missing), len(steps))
        columns = [[values[0] for values in _columns(step)] for step in steps]
        for part in range(max(map(len, columns))):
            known = torch.stack([_unit(each[min(part, len(each) - 1)]) for each in columns])
            related = torch.maximum(related, (wanted @ known.mT).abs())
        pairs = []
        for row, index in enumerate(missing):
            order = related[row].argsort(descending=True)[:TRIED].tolist()
            pairs += [
                (index, steps[place]) for place in order
                if related[row, place] > RELATED and (index, id(steps[place])) not in tried
            ]  # fmt: skip
        return pairs

    def _try(
        self,
        call: Call,
        samples: list[Sample],
        pairs: list[tuple[int, Step]],
        best: list[_Best],
    ) -> None:
        """Fit samples to steps, and keep the best of what is a proof."""
        pairs = [pair for pair in pairs if len(_columns(pair[1])) > 1]
        if not pairs:
            return
        limits = limits_of(call.dtype)
        proven = torch.ones(len(pairs), dtype=torch.bool)
        moved = torch.zeros(len(pairs), dtype=torch.bool)
        left = torch.zeros(len(pairs), dtype=torch.float64)
        for part in range(len(samples[0].values)):
            target = torch.stack([samples[index].values[part] for index, _ in pairs]).double()
            basis, newest = _basis([step for _, step in pairs], part)
            same = target == basis[..., 0]
            same &= same.double().mean(1, keepdim=True) > CHANGING
            result = fit(target, basis, newest, rounding(call.dtype), same)
            # A part may stay what it is: a picture that is shown to the model at every step.
            still = same.all(1)
            enough = (~same).sum(1) >= 1.5 * basis.shape[-1] + FEWEST
            proven &= still | (result.proves(limits) & enough)
            moved |= ~still
            left = torch.maximum(left, torch.where(still, 0.0, result.left))
        proven &= moved
        for (index, step), proof, rest in zip(pairs, proven.tolist(), left.tolist(), strict=True):
            if rest > limits.unexplained:
                self.smallest_refused = min(self.smallest_refused, rest)
            elif proof:  # else it is explained by what came before that step
                best[index].take(step, rest, limits.sure)
            else:
                best[index].rivals.append((step, rest))

    # What is known

    def add(self, call: Call, placed: Sequence[Placed], record: Any) -> list[Evaluation]:
        """Take a call in, once it has been done."""
        evaluations, begun = [], False
        for index, (sample, each) in enumerate(zip(call.samples, placed, strict=True)):
            key = call.form, sample.key
            step = self.steps.get(key)
            if step is None:
                step = self.steps[key] = each.step
                if step.parent is None:
                    begun = True
                else:
                    self.forks += step.parent.children > 0
                    step.parent.children += 1
                    self.over.pop(id(step.parent), None)
            elif not each.repeats:
                self.siblings += 1
            evaluation = Evaluation(
                step, record, index, call.conditions[index], each.link, each.changed, each.clock,
                each.before is not None,
            )  # fmt: skip
            # A repeat takes the place of what it repeats.
            evaluation.visits += sum(
                known.visits for known in step.evaluations
                if known.conditions == evaluation.conditions
            )  # fmt: skip
            step.evaluations = [
                known for known in step.evaluations if known.conditions != evaluation.conditions
            ]
            step.evaluations.append(evaluation)
            evaluations.append(evaluation)
            if not step.times:
                step.times = each.times
            if each.link is not None and (known := self.records.get(id(each.link.record))):
                known.continued = True
                self.records.move_to_end(id(each.link.record))
        self.started += begun
        if begun:
            for known in self.records.values():
                if not known.continued:
                    self._note_length(known.distinct[0])
            for last in self.over.values():
                self._forget_path(last)
            self.over.clear()
        distinct = list(dict.fromkeys(each.step for each in evaluations))
        self.records[id(record)] = _Known(record, call.form, evaluations, distinct)
        self._forget()
        return evaluations

    def _note_length(self, step: Step) -> None:
        """Remember how long a run has become, when it seems to be over or another begins."""
        if step.depth < 2:
            return
        others = self.lengths.setdefault(step.times[:2], {})
        others[step.run] = max(others.pop(step.run, 0), step.depth + 1)
        while len(others) > self.limit:
            del others[next(iter(others))]
        while len(self.lengths) > KNOWN_LENGTHS:
            self.lengths.popitem(last=False)

    def length(self, placed: Placed) -> int | None:
        """How long a run will be, as far as it can be told: as the caller says, as another that
        began at the same times, or by its times."""
        if self.steps_known is not None:
            return self.steps_known
        estimate = _estimated(placed.times, *placed.error)
        step = placed.step
        others = self.lengths.get(placed.times[:2], {})
        known = max((length for run, length in others.items() if run != step.run), default=0)
        if estimate is None:
            return known if known > step.depth and placed.times[-1] <= 0 else None
        # A run that was cut off says nothing of the next one's length.
        fits = abs(known - estimate) < known / 4 or fits_times(known, placed.times, *placed.error)
        return known if known > step.depth and fits else estimate

    def is_over(self, placed: Placed) -> tuple[bool, bool]:
        """Whether a step is its run's last, as far as it can be told, and whether that is certain:
        as the caller says, or as another run was."""
        times = placed.times
        if self.steps_known is None and len(times) > 1 and times[-1] <= 0 < times[0]:
            return True, True  # no time is left
        steps = self.length(placed)
        if steps is None or placed.step.depth < steps - 1:
            return False, False
        others = self.lengths.get(placed.times[:2], {})
        return True, self.steps_known is not None or steps in others.values()

    def end(self, last: Step, certain: bool) -> None:
        """Say that a run is over by this step: forget it, back to where another has forked from it,
        once all branches of the step are done; where that is not certain, when the next run begins.
        """
        self._note_length(last)
        if not certain:
            self.over[id(last)] = last
        elif last.parent is None or len(last.evaluations) >= len(last.parent.evaluations):
            self._forget_path(last)

    def _forget_path(self, last: Step) -> None:
        """Drop a run's steps, but for those that others have come by and may go on from."""
        step: Step | None = last
        while step is not None:
            parent = step.parent
            step.ended += 1
            if step.children == 0 and step.ended >= max(
                (e.visits for e in step.evaluations), default=0
            ):
                for key in {id(each.record) for each in step.evaluations}:
                    if key in self.records:
                        self._drop(key)
            step = parent

    def drop_states(self) -> None:
        """Drop all state; what steps are made of stays known."""
        for known in self.records.values():
            known.record.carried = None

    def _forget(self) -> None:
        """Drop what is used least: calls that nothing continued, with what led to them alone."""
        waiting = [key for key, known in self.records.items() if not known.continued]
        for key in waiting[: max(len(waiting) - self.limit, 0)]:
            self._drop(key)
        for key in list(self.records)[: max(len(self.records) - KEPT * self.limit, 0)]:
            self._drop(key)

    def _drop(self, key: int) -> None:
        """Forget a call, and its steps where it was their only one."""
        for evaluation in self.records.pop(key).evaluations:
            step = evaluation.step
            evaluation.before = None
            if evaluation in step.evaluations:
                step.evaluations.remove(evaluation)
            if step.evaluations or self.steps.get((step.form, step.sample.key)) is not step:
                continue
            del self.steps[step.form, step.sample.key]
            if step.parent is not None:
                step.parent.children -= 1
            step.parent = None


class _Witnesses:
    """What all models of the process have answered on a sample: a sampler may use two (guidance by
    a weaker model), and each of them has seen but its own outputs."""

    def __init__(self) -> None:
        self.known: OrderedDict[Any, list[tuple[int, tuple[Tensor, ...]]]] = OrderedDict()

    def add(self, step: Step, outputs: tuple[Tensor, ...]) -> None:
        key = step.form, step.sample.key, step.box
        known = self.known.setdefault(key, [])
        known.append((step.runs, outputs))
        del known[:-MOST_COLUMNS]
        self.known.move_to_end(key)
        while len(self.known) > WITNESSED:
            self.known.popitem(last=False)

    def others(self, step: Step) -> list[tuple[Tensor, ...]]:
        known = self.known.get((step.form, step.sample.key, step.box), [])
        return [outputs for runs, outputs in reversed(known) if runs != step.runs]


_witnesses = _Witnesses()


def answered(evaluation: Evaluation, outputs: tuple[Tensor, ...], box: tuple[Any, ...]) -> None:
    """Note what a model has answered, now that it was read. box: what the positions lie in."""
    evaluation.outputs = outputs
    evaluation.step.box = box
    _witnesses.add(evaluation.step, outputs)


@dataclass(eq=False)
class _Best:
    """The best proof of where a sample comes from. left: see `provenance.Fit`; sure: whether it
    need not be compared with others. rivals: steps that explain the sample, but without their
    outputs being needed, and what they leave."""

    step: Step | None = None
    left: float = float("inf")
    sure: bool = False
    rivals: list[tuple[Step, float]] = field(default_factory=list)

    def take(self, step: Step, left: float, sure: float) -> None:
        if left < self.left:
            self.step, self.left, self.sure = step, left, left <= sure

    def doubtful(self) -> bool:
        """Whether a rival may be the origin. In coarse types rounding hides what a smooth run's
        newest output adds: its step explains the sample, unproven, and one before it seems to be
        the origin."""
        assert self.step is not None
        return self.step.doubted or any(
            left < RIVAL * self.left or self.step in rival.path() for rival, left in self.rivals
        )


@dataclass(eq=False)
class _Known:
    """A call that has been taken in. distinct: its steps. continued: whether another followed."""

    record: Any
    form: tuple[Any, ...]
    evaluations: list[Evaluation]
    distinct: list[Step]
    continued: bool = False


_estimated = functools.lru_cache(maxsize=256)(estimate_steps)


def _times(
    parent: Step | None, link: Evaluation | None, conditions: tuple[Any, ...],
    clock: frozenset[int],
) -> tuple[float, ...]:  # fmt: skip
    before = () if parent is None else parent.times
    if len(before) == 1 and link is not None:
        # By now it shows which inputs are the time.
        before = (_time(link.conditions, clock),)
    return (*before, _time(conditions, clock))


def _time(conditions: tuple[Any, ...], clock: frozenset[int]) -> float:
    """What the time inputs hold, together."""
    return sum(float(conditions[index]) for index in clock)


def _followed(
    earlier: Step, conditions: tuple[Any, ...]
) -> tuple[Evaluation | None, frozenset[int]]:
    """The evaluation of an earlier step that conditions continue, and those that changed since."""
    dividing = {
        index
        for one, other in itertools.pairwise(earlier.evaluations)
        for index in _differing(one.conditions, other.conditions)
    }
    found = []
    for evaluation in earlier.evaluations:
        changed = _differing(evaluation.conditions, conditions)
        if not changed & dividing:
            found.append((evaluation, changed))
    return found[-1] if len(found) == 1 else (None, frozenset())


def _differing(left: tuple[Any, ...], right: tuple[Any, ...]) -> frozenset[int]:
    pairs = zip(left, right, strict=True)
    return frozenset(index for index, (one, other) in enumerate(pairs) if one != other)


def _varying(evaluation: Evaluation) -> frozenset[int]:
    """The conditions that changed on both of a branch's last two steps."""
    before = evaluation.before
    return frozenset() if before is None else evaluation.changed & before.changed


def _columns(step: Step) -> list[tuple[Tensor, ...]]:
    """A step's sample, and the outputs at it, for all parts of a sample."""
    outputs = [each.outputs for each in reversed(step.evaluations) if each.outputs is not None]
    outputs += _witnesses.others(step)
    return [step.sample.values, *outputs[: MOST_COLUMNS - 1]]


def _basis(steps: Sequence[Step], part: int) -> tuple[Tensor, Tensor]:
    """What samples are fitted to: [S, P, K], the newest sample first; which are newest outputs."""
    bases, marks = [], []
    for step in steps:
        columns, newest = [], []
        for age, each in enumerate(step.path()):
            own = [values[part] for values in _columns(each)]
            columns += own
            newest += [False, *[age == 0] * (len(own) - 1)]
        bases.append(columns)
        marks.append(newest)
    width = max(map(len, bases))
    nothing = torch.zeros_like(bases[0][0])
    # One stack for all: there may be hundreds of small ones.
    flat = [each for columns in bases for each in [*columns, *[nothing] * (width - len(columns))]]
    filled = torch.stack(flat).double().view(len(bases), width, len(nothing))
    padded = [[*each, *[False] * (width - len(each))] for each in marks]
    return filled.mT, torch.tensor(padded)


def _unit(values: Tensor) -> Tensor:
    return values / values.norm().clamp(min=1e-30)
