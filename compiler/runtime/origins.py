"""Where the samples of a call come from: the search for the steps that provably explain them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .blends import put_back
from .provenance import FINE, WEIGHED, few, fit, limits_of, rounding
from .steps import Call, Evaluation, Sample, Step

__all__ = ["Origins", "answered", "origins", "weigh"]

MOST_COLUMNS = 12  # of a basis for one step: its sample, and outputs at it
TRIED = 48  # steps that a sample is fitted to at the most
RIVAL = 2.0  # how much more than a proof any other explanation has to leave
BETTER = 1.2  # a proof that leaves so much more than a rival is none
LATER = 3  # steps before a rival, among which the best makes it the likely origin
BLENDS, ALL_BLENDS = 8, 32  # steps of which a sample is tried to be a blend, and a whole call
RELATED = 0.05  # the least correlation with what is fitted
SLIGHT = 1e-3  # of the largest weight, below which a weight is none
WITNESSES = 4  # other models' outputs that a sample is tried to be made of, too
WITNESSED = 256  # samples whose outputs other models may look at
CLOSE = 0.95  # of a sample; where less is left, a step may be what it comes from
CHANGING = 0.02  # of a sample's positions, where fewer are unchanged, none is left out for that
FEWEST = 4  # positions that a fit needs beyond three for two columns


@dataclass
class Origins:
    """The step that each sample of a call continues, where one provably is; None elsewhere, and
    then `guesses` has the step that it seems to continue, if any does.

    accepted, refused: the most that a proof has left, and the least that an explanation left which
    is none, in expected rounding errors.
    """

    steps: list[Step | None]
    guesses: list[Step | None]
    accepted: float = 0.0
    refused: float = float("inf")


def origins(
    call: Call, samples: Sequence[Sample], tips: Iterable[list[Step]], steps: Iterable[Step]
) -> Origins:
    """Find where the samples of a call come from.

    tips: the steps of calls that nothing has continued yet, newest first; steps: all of the form.
    """
    if not samples or not samples[0].values:  # those of the first call of a form have none yet
        nothing = [None] * len(samples)
        return Origins([*nothing], [*nothing])
    search = _Search(call, samples)
    # Mostly a call continues one of the last; its samples are in the same order.
    for each in tips:
        search.tips.update(map(id, each))
        if len(each) == len(samples):
            search.try_out([(index, each[index]) for index in search.open])
    if search.open:
        search.try_out(search.related(list(steps)))
    if search.error <= FINE:
        # In coarse types too few roundings lie between what is put back and what is not.
        search.fit_to(search.partial(), blended=True)
    return search.found()


def weigh(call: Call, made: Sequence[Step]) -> None:
    """Find out how steps were made of their parents: where that is by the parent alone (samplers of
    first order), what weight its outputs have.

    In units in which a is 1 throughout, a sampler's x' = a x + b y adds b y / (a times those of the
    steps before), so weights can be compared from step to step.
    """
    pairs = [(each, each.parent) for each in made if each.parent and _answered(each.parent)]
    _weigh(call, [(step, parent, []) for step, parent in pairs])
    # Where its model's own outputs do not explain it, with one of another's: not with all at once,
    # as those that are equal would share their weight.
    unexplained = [
        (step, parent, _witnesses.others(parent)) for step, parent in pairs if not step.weights
    ]
    for number in range(WITNESSES):
        _weigh(call, [
            (step, parent, others[number : number + 1]) for step, parent, others in unexplained
            if not step.weights and len(others) > number
        ])  # fmt: skip


def _weigh(call: Call, tried: Sequence[tuple[Step, Step, list[tuple[Tensor, ...]]]]) -> None:
    """Fit steps to their parents' own outputs and those of another model."""
    if not tried:
        return
    part = 0  # one share of time for all of a sample's parts: video and audio go together
    target = torch.stack([few(step.sample.values[part], WEIGHED) for step, _, _ in tried]).double()
    bases = [
        [few(values[part], WEIGHED) for values in [*_columns(parent, alone=True), *more]]
        for _, parent, more in tried
    ]
    basis = _stacked(bases)
    nothing = torch.zeros(basis.shape[::2], dtype=torch.bool)
    found = fit(target, basis, nothing, rounding(call.dtype), torch.zeros_like(target) > 0)
    explained = (found.left <= limits_of(call.dtype).unexplained).tolist()
    for (step, parent, _), factors, proven in zip(
        tried, found.factors.tolist(), explained, strict=True
    ):
        if not proven or factors[0] <= 0:
            continue
        step.scale = parent.scale * factors[0]
        own = [each for each in reversed(parent.evaluations) if each.outputs is not None]
        pairs = list(zip(own[: MOST_COLUMNS - 1], factors[1:], strict=False))
        largest = max((abs(factor) for _, factor in pairs), default=0.0)
        for evaluation, factor in pairs:
            # Guidance of 1 does not use one of its answers: what rounding leaves it is no weight.
            used = abs(factor) > SLIGHT * largest
            step.weights[evaluation.conditions] = factor / step.scale if used else 0.0


class _Search:
    """The fits of one call's samples to steps."""

    def __init__(self, call: Call, samples: Sequence[Sample]) -> None:
        self.samples = samples
        self.error, self.limits = rounding(call.dtype), limits_of(call.dtype)
        self.best = [_Best() for _ in samples]
        self.tried: set[tuple[int, int]] = set()
        self.tips: set[int] = set()
        self.refused = float("inf")

    @property
    def open(self) -> list[int]:
        """The samples for which it is worth while to go on."""
        return [index for index, each in enumerate(self.best) if not each.sure]

    def related(self, steps: list[Step]) -> list[tuple[int, Step]]:
        """Pairs of a sample and a step that may explain it: those with something in common."""
        if not steps:
            return []
        wanted = torch.stack([_unit(self.samples[index].values[0]) for index in self.open])
        related = torch.zeros(len(wanted), len(steps))
        columns = [[values[0] for values in _columns(step)] for step in steps]
        for part in range(max(map(len, columns))):
            known = torch.stack([_unit(each[min(part, len(each) - 1)]) for each in columns])
            related = torch.maximum(related, (wanted @ known.mT).abs())
        pairs = []
        for row, index in enumerate(self.open):
            order = related[row].argsort(descending=True)[:TRIED].tolist()
            pairs += [(index, steps[place]) for place in order if related[row, place] > RELATED]
        return pairs

    def try_out(self, pairs: list[tuple[int, Step]]) -> None:
        """Fit samples to steps, and keep the best of what is a proof."""
        pairs = [
            (index, step) for index, step in pairs
            if (index, id(step)) not in self.tried and _answered(step)
        ]  # fmt: skip
        self.tried |= {(index, id(step)) for index, step in pairs}
        self.fit_to(pairs)

    def partial(self) -> list[tuple[int, Step]]:
        """Pairs of a sample that nothing explains and a step that does in part, as where known
        pixels were put back; first those of calls that nothing has continued yet."""
        most = min(BLENDS, max(1, ALL_BLENDS // len(self.best)))
        return [
            (index, step)
            for index, each in enumerate(self.best) if each.step is None
            for _, step in sorted(each.partly, key=self.promising)[:most]
        ]  # fmt: skip

    def promising(self, found: tuple[float, Step]) -> tuple[bool, float]:
        """A key to sort what explains a sample in part."""
        left, step = found
        return id(step) not in self.tips, left

    def fit_to(self, pairs: list[tuple[int, Step]], blended: bool = False) -> None:
        """Fit samples to steps. blended: but for pixels that were put back; what is left of a
        sample may be little, so without other models' outputs."""
        if not pairs:
            return
        proven = torch.ones(len(pairs), dtype=torch.bool)
        moved = torch.zeros(len(pairs), dtype=torch.bool)
        left = torch.zeros(len(pairs), dtype=torch.float64)
        for part in range(len(self.samples[0].values)):
            target = torch.stack([self.samples[index].values[part] for index, _ in pairs]).double()
            basis, newest, earlier = _basis(
                [step.path(self.limits.reach, guessed=True) for _, step in pairs],
                part,
                alone=blended,
            )
            same = target == basis[..., 0]
            same &= same.double().mean(1, keepdim=True) > CHANGING
            if blended:
                for row in range(len(pairs)):
                    back = put_back(target[row], basis[row][:, earlier[row]], self.error)
                    same[row] = same[row] if back is None else back
            result = fit(target, basis, newest, self.error, same)
            # A part may stay what it is: a picture that is shown to the model at every step.
            still = same.all(1)
            enough = (~same).sum(1) >= 1.5 * basis.shape[-1] + FEWEST
            proven &= still | (result.proves(self.limits) & enough)
            moved |= ~still
            left = torch.maximum(left, torch.where(still, 0.0, result.left))
        proven &= moved
        for (index, step), proof, rest in zip(pairs, proven.tolist(), left.tolist(), strict=True):
            best = self.best[index]
            if proof:
                best.take(step, rest, self.limits.sure)
            elif rest <= RIVAL * self.limits.unexplained:  # or by what came before that step
                best.rivals.append((step, rest))
            if rest > self.limits.unexplained:
                self.refused = min(self.refused, rest)
            if rest * self.error < CLOSE:
                best.resembles(step, rest)
                if rest > self.limits.unexplained and not blended:
                    best.partly.append((rest, step))

    def found(self) -> Origins:
        """The result, without what is in doubt."""
        for each in self.best:
            if each.step is not None and (likely := each.likely(self.limits.alone)):
                each.guess = max((each.step, *likely), key=lambda step: step.depth)
                each.step = None
        accepted = [each.left for each in self.best if each.step is not None]
        steps = [each.step for each in self.best]
        guesses = [each.guess if each.step is None else None for each in self.best]
        return Origins(steps, guesses, max(accepted, default=0.0), self.refused)


@dataclass(eq=False)
class _Best:
    """The best proof of where a sample comes from. left: see `provenance.Fit`; sure: whether it
    need not be compared with others. rivals: other steps that explain the sample or nearly so, by
    a worse proof or without their outputs being needed, and what they leave. guess, near: the step
    that comes nearest to an explanation, and what it leaves. partly: what is left by steps that
    explain it in part."""

    step: Step | None = None
    left: float = float("inf")
    sure: bool = False
    rivals: list[tuple[Step, float]] = field(default_factory=list)
    guess: Step | None = None
    near: float = float("inf")
    partly: list[tuple[float, Step]] = field(default_factory=list)

    def take(self, step: Step, left: float, sure: float) -> None:
        if left >= self.left:
            self.rivals.append((step, left))
            return
        if self.step is not None:
            self.rivals.append((self.step, self.left))
        self.step, self.left, self.sure = step, left, left <= sure

    def resembles(self, step: Step, left: float) -> None:
        if left < self.near:
            self.guess, self.near = step, left

    def likely(self, alone: float) -> list[Step]:
        """The rivals that may be the origin instead: those that explain the sample better.

        Where more than `alone` is left, those too that explain it nearly as well. In coarse types
        rounding hides what a smooth run's newest output adds: its step explains the sample,
        unproven, and one before it seems to be the origin.
        """
        if self.left <= alone:
            return [rival for rival, left in self.rivals if BETTER * left < self.left]
        return [
            rival for rival, left in self.rivals
            if left < RIVAL * self.left
            or any(step is self.step for step in rival.path(LATER, guessed=True))
        ]  # fmt: skip


class _Witnesses:
    """What all models of the process have answered on a sample: a sampler may use two (guidance by
    a weaker model), and each of them has seen but its own outputs. Graphs have locks of their own,
    so it has one, too."""

    def __init__(self) -> None:
        self.known: OrderedDict[Any, list[tuple[int, tuple[Tensor, ...]]]] = OrderedDict()
        self.lock = threading.Lock()

    def add(self, step: Step, outputs: tuple[Tensor, ...]) -> None:
        key = step.form, step.sample.key, step.box
        with self.lock:
            known = self.known.setdefault(key, [])
            known.append((step.runs, outputs))
            del known[:-MOST_COLUMNS]
            self.known.move_to_end(key)
            while len(self.known) > WITNESSED:
                self.known.popitem(last=False)

    def others(self, step: Step) -> list[tuple[Tensor, ...]]:
        with self.lock:
            known = list(self.known.get((step.form, step.sample.key, step.box), ()))
        return [outputs for runs, outputs in reversed(known) if runs != step.runs]


_witnesses = _Witnesses()


def answered(evaluation: Evaluation, outputs: tuple[Tensor, ...], box: tuple[Any, ...]) -> None:
    """Note what a model has answered, now that it was read. box: what the positions lie in."""
    evaluation.outputs = outputs
    evaluation.step.box = box
    _witnesses.add(evaluation.step, outputs)


def _answered(step: Step) -> bool:
    """Whether any output at a step is known."""
    own = any(each.outputs is not None for each in step.evaluations)
    return own or bool(_witnesses.others(step))


def _columns(step: Step, alone: bool = False) -> list[tuple[Tensor, ...]]:
    """A step's sample and the outputs at it, for all parts of a sample; alone: its model's only."""
    outputs = [each.outputs for each in reversed(step.evaluations) if each.outputs is not None]
    outputs += [] if alone else _witnesses.others(step)
    return [step.sample.values, *outputs[: MOST_COLUMNS - 1]]


def _basis(
    paths: Sequence[Iterable[Step]], part: int, alone: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What samples are fitted to: [S, P, K], the newest sample first; which are newest outputs, and
    which are samples. alone: see `_columns`."""
    bases, marks, samples = [], [], []
    for path in paths:
        columns, newest, earlier = [], [], []
        for age, each in enumerate(path):
            own = [values[part] for values in _columns(each, alone)]
            columns += own
            newest += [False, *[age == 0] * (len(own) - 1)]
            earlier += [True, *[False] * (len(own) - 1)]
        bases.append(columns)
        marks.append(newest)
        samples.append(earlier)
    filled = _stacked(bases)
    width = filled.shape[-1]
    padded, of_samples = (
        torch.tensor([[*each, *[False] * (width - len(each))] for each in rows])
        for rows in (marks, samples)
    )
    return filled, padded, of_samples


def _stacked(bases: Sequence[Sequence[Tensor]]) -> Tensor:
    """Columns [P] of each as [S, P, K] in float64, filled up with columns of zeros."""
    width, nothing = max(map(len, bases)), torch.zeros_like(bases[0][0])
    # One stack for all: there may be hundreds of small ones.
    flat = [each for columns in bases for each in [*columns, *[nothing] * (width - len(columns))]]
    return torch.stack(flat).double().view(len(bases), width, len(nothing)).mT


def _unit(values: Tensor) -> Tensor:
    return values / values.norm().clamp(min=1e-30)
