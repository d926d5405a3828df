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
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...passes.pade.schedule import estimate_steps, fits_times, says_length
from .origins import origins, weigh
from .provenance import MOST
from .steps import Call, Counts, Evaluation, Known, Placed, Root, Sample, Step

__all__ = ["Runs"]

BRANCHES = 3  # steps back that a branch may have been left out since
KEPT = 16  # calls that are kept for each of `limit`
STRETCH = 2.0  # the most by which a step may be longer or shorter than the one before
KNOWN_LENGTHS = 32  # finished schedules that are remembered, to know a run's length beforehand


@dataclass
class Runs:
    """The steps that one model in one graph has seen, least recently used first.

    limit: calls that nothing has continued yet, whose steps are kept. positions: how many are
        looked at of each sample. vouched: whether the caller says that all calls are of one run,
        each on the sample that the one before has led to.
    weighs: whether to find out what weights outputs have in the samples that come after them.
    weights: those of each step, where the caller says so.
    steps_known: how many steps a run has, where the caller says so.
    lengths: how long runs have become, by their first two times and their numbers.
    over: last steps of runs that seem to be.
    counts: what has happened, for `stats`; a model's runs share them.
    """

    limit: int
    positions: int = MOST
    counts: Counts = field(default_factory=Counts)
    vouched: bool = False
    weighs: bool = False
    weights: Sequence[float] | None = None
    steps_known: int | None = None
    steps: dict[tuple[Any, ...], Step] = field(default_factory=dict)
    records: OrderedDict[int, Known] = field(default_factory=OrderedDict)
    lengths: OrderedDict[tuple[float, ...], dict[int, int]] = field(default_factory=OrderedDict)
    number: int = field(default_factory=itertools.count().__next__)
    over: dict[int, Step] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=itertools.count)

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
        parents, guesses = self._parents(call, list(unknown.values()))
        number = next(self.numbers)
        for sample, parent, guess in zip(unknown.values(), parents, guesses, strict=True):
            depth = 0 if parent is None else parent.depth + 1
            depth = depth if call.depth is None else call.depth
            run = number if parent is None else parent.run
            found[sample.key] = Step(
                sample, call.form, parent, depth, run, runs=self.number, guess=guess
            )
        if self.weighs:
            weigh(call, [found[sample.key] for sample in unknown.values()])
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
            return Placed(
                step, before, root, link, changed, clock, times, call.time_error, repeats,
                self._weight(step, link),
            )  # fmt: skip

        for known in reversed(step.evaluations):
            if known.conditions == conditions:
                root = "" if known.stateful else Root.NEW
                before = known.before if known.stateful else None
                return placed(before, root, known.before, known.changed, known.clock, True)
        if step.parent is None:
            return placed(None, Root.NEW)
        for earlier in step.parent.path(BRANCHES):
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

    def _weight(self, step: Step, link: Evaluation | None) -> float:
        """The weight that the outputs at a step will have, after those of `link`, as far as it can
        be told."""
        if self.weights is not None and step.depth < len(self.weights):
            return self.weights[step.depth]
        newest = math.nan if link is None else step.weights.get(link.conditions, math.nan)
        if link is None or link.before is None:
            return newest
        before = link.step.weights.get(link.before.conditions, math.nan)
        if math.isnan(before):
            return newest
        # Spacings change slowly; another ratio is that of outputs which the sampler does not use.
        ratio = newest / before if before else 0.0
        return newest * ratio if 1 / STRETCH <= ratio <= STRETCH else math.nan

    def _parents(
        self, call: Call, samples: Sequence[Sample]
    ) -> tuple[Sequence[Step | None], Sequence[Step | None]]:
        """The step that each new sample continues; or only seems to."""
        nothing = [None] * len(samples)
        if self.vouched:
            newest = next(reversed(self.records.values()), None)
            if newest is None or newest.form != call.form or len(newest.distinct) != len(samples):
                return nothing, nothing
            return newest.distinct, nothing
        tips = (
            known.distinct for known in reversed(self.records.values())
            if not known.continued and known.form == call.form
        )  # fmt: skip
        steps = (each for each in self.steps.values() if each.form == call.form)
        found = origins(call, samples, tips, steps)
        self.counts.largest_accepted = max(self.counts.largest_accepted, found.accepted)
        self.counts.smallest_refused = min(self.counts.smallest_refused, found.refused)
        return found.steps, found.guesses

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
                    self.counts.forks += step.parent.children > 0
                    step.parent.children += 1
                    self.over.pop(id(step.parent), None)
            elif not each.repeats:
                self.counts.siblings += 1
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
        self.counts.started += begun
        if begun:
            for known in self.records.values():
                if not known.continued:
                    self._note_length(known.distinct[0])
            for last in self.over.values():
                self._forget_path(last)
            self.over.clear()
        distinct = list(dict.fromkeys(each.step for each in evaluations))
        self.records[id(record)] = Known(record, call.form, evaluations, distinct)
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
        return self._length(placed)[0]

    def _length(self, placed: Placed) -> tuple[int | None, bool]:
        """The same, and whether it is more than a guess."""
        if self.steps_known is not None:
            return self.steps_known, True
        estimate = _estimated(placed.times, *placed.error)
        step = placed.step
        others = self.lengths.get(placed.times[:2], {})
        known = max((length for run, length in others.items() if run != step.run), default=0)
        if estimate is None:
            return known if known > step.depth and placed.times[-1] <= 0 else None, False
        told = _told(estimate, placed.times, *placed.error)
        # A run that was cut off says nothing of the next one's length, but more than a guess does.
        fits = (
            not told
            or abs(known - estimate) < known / 4
            or fits_times(known, placed.times, *placed.error)
        )
        return known if known > step.depth and fits else estimate, told

    def is_over(self, placed: Placed) -> tuple[bool, bool]:
        """Whether a step is its run's last, as far as it can be told, and whether that is certain:
        as the caller says, or as another run was and the times say, too."""
        times = placed.times
        if self.steps_known is None and len(times) > 1 and times[-1] <= 0 < times[0]:
            return True, True  # no time is left
        steps, told = self._length(placed)
        if steps is None or placed.step.depth < steps - 1:
            return False, False
        others = self.lengths.get(placed.times[:2], {})
        return True, told and (self.steps_known is not None or steps in others.values())

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
            step.parent = step.guess = None


_estimated = functools.lru_cache(maxsize=256)(estimate_steps)
_told = functools.lru_cache(maxsize=256)(says_length)


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
    return frozenset([index for index, (one, other) in enumerate(pairs) if one != other])


def _varying(evaluation: Evaluation) -> frozenset[int]:
    """The conditions that changed on both of a branch's last two steps."""
    before = evaluation.before
    return frozenset() if before is None else evaluation.changed & before.changed
