"""What runs are made of: steps, which are distinct samples, and their evaluations, which are calls.

What is known of a step never changes, so that a run may go on from any of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Call", "Counts", "Evaluation", "Known", "Placed", "Root", "Sample", "Step"]


@dataclass(frozen=True)
class Sample:
    """One sample of a call: its values at some positions, [P] for each of the model's samples
    (video and audio: two), on the CPU, in its type; and a hash of all bits."""

    values: tuple[Tensor, ...]
    key: bytes


@dataclass(frozen=True)
class Call:
    """What a call says about where it belongs. Lists have an entry for each sample of the batch.

    form: what has to be equal within a run: shapes. conditions: hashes and numbers; clock: which
    of them are values of inputs that may be the time. dtype: the coarsest type that samples and
    outputs are rounded to. depth: how many steps its run had before, where the caller says so.
    time_error: how far times may be from what they were before they were rounded: as a part of
    them, and in all.
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
    DROPPED = (
        "the state of the step before was dropped: for its age or size, for other weights, or for "
        "a callback that changed a tensor"
    )
    BLIND = "no input is recognised as the sample, with an output like it"


@dataclass(eq=False)
class Evaluation:
    """One sample of one call. record: the call's; index: the sample's place in its batch.

    outputs: the model's outputs at the sample's positions, once they have been read.
    before: the evaluation that it continues. changed: which conditions differ from that one's.
    clock: which of the conditions are the time, by this branch's steps so far.
    stateful: whether that one's state was continued, too.
    last: the newest computed step of the branch with this one, counted from 1; 0 for none.
    begun: the step that the oldest of its state is of.
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
    begun: int = 0
    visits: int = 1
    outputs: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class Step:
    """A distinct sample. depth: how many steps its run had before; times: of these and its own.
    run: its run's number. children: steps that continue it. ended: runs that came by and are over.
    box: what its positions lie in and how many they are, once that is known; runs: the number of
    the `Runs` it is of.
    scale: of its run's first sample in it, or of the last one from which it is known. weights: of
    its parent's outputs in it and all that comes after, by their conditions, where they are known.
    guess: where nothing is proven, the step that it seems to come from. What comes after it may be
    made of that one's outputs, too; no state is taken from there.
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
    scale: float = 1.0
    weights: dict[tuple[Any, ...], float] = field(default_factory=dict)
    guess: Step | None = None

    def path(self, reach: int, guessed: bool = False) -> Iterator[Step]:
        """This step and those before it, newest first, `reach` in all. guessed: with those that are
        not proven."""
        step: Step | None = self
        for _ in range(reach):
            if step is None:
                return
            yield step
            step = step.parent or (step.guess if guessed else None)


@dataclass(frozen=True)
class Placed:
    """Where one sample of a call belongs. step: new, or one that is known. before: what its state
    comes from; None where there is none, and then `root` says why. link: the evaluation that it
    follows, with or without state. times: of the run's steps up to this one; error: see `Call`.
    repeats: whether there was an evaluation with all the same. weight: that its outputs will have,
    by what those before had; NaN where that is not known."""

    step: Step
    before: Evaluation | None
    root: str
    link: Evaluation | None
    changed: frozenset[int]
    clock: frozenset[int]
    times: tuple[float, ...]
    error: tuple[float, float]
    repeats: bool = False
    weight: float = math.nan


@dataclass(eq=False)
class Known:
    """A call that has been taken in. distinct: its steps. continued: whether another followed."""

    record: Any
    form: tuple[Any, ...]
    evaluations: list[Evaluation]
    distinct: list[Step]
    continued: bool = False


@dataclass
class Counts:
    """What has happened to the runs of one model in one graph; see `accel.Stats`."""

    started: int = 0
    forks: int = 0
    siblings: int = 0
    largest_accepted: float = 0.0
    smallest_refused: float = float("inf")
