"""Runs that the caller vouches for: `accel.trajectory`, and the pipelines of `accel.accelerate`."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .runs import Runs

__all__ = ["Explicit", "Moment", "Told", "enclosing", "enter_explicit", "told"]


@dataclass(frozen=True)
class Moment:
    """Where in a run a call is, as a pipeline's scheduler says: the step, counted from 0, and its
    timestep."""

    step: int
    time: float


@dataclass(eq=False)
class Explicit:
    """A run of a model, or one branch of the run around it; its state for each compiled graph.

    parameters: ids of the model's. steps: how many the run has, if known. weights: of each step's
    output in the samples that come after it, where that is known. branch: its name; None
    where the calls' conditions tell branches apart. where: says where in the run a call is now, so
    that no tensor has to be read, and named: the name of its branch, if it has one; both of a
    pipeline's.
    """

    parameters: frozenset[int]
    steps: int | None = None
    weights: Sequence[float] | None = None
    branch: str | None = None
    where: Callable[[], Moment | None] | None = None
    named: Callable[[], str | None] | None = None
    runs: dict[tuple[int, str | None], Runs] = field(default_factory=dict)
    kept: dict[int, list[Tensor]] = field(default_factory=dict)

    def keep(self, step: int, tensors: Sequence[Tensor]) -> None:
        """Keep a step's conditions alive until the next step is done, so that nothing else can lie
        where they lie."""
        self.kept.setdefault(step, []).extend(tensors)
        for old in [each for each in self.kept if each < step - 1]:
            del self.kept[old]


_explicit: contextvars.ContextVar[tuple[Explicit, ...]] = contextvars.ContextVar(
    "accel_trajectory", default=()
)


@dataclass(frozen=True)
class Told:
    """What is said of a call: its run, its branch and its moment; the latter two may be unknown."""

    run: Explicit
    branch: str | None
    moment: Moment | None


def told(parameter: int) -> Told | None:
    """What is said of a call of a model, known by the id of one parameter."""
    branch = None
    for explicit in reversed(_explicit.get()):
        if parameter not in explicit.parameters:
            continue
        branch = branch or explicit.branch
        if explicit.where is not None:
            moment = explicit.where()
            if moment is None:
                return None  # a call outside the pipeline's loop
            return Told(explicit, branch or (explicit.named and explicit.named()), moment)
        if explicit.branch is None or explicit.steps is not None:
            return Told(explicit, branch, None)
    return None


def enclosing(parameters: frozenset[int]) -> Explicit | None:
    """The run around here of a model with these parameters."""
    found = (each for each in reversed(_explicit.get()) if each.parameters & parameters)
    return next(found, None)


@contextlib.contextmanager
def enter_explicit(explicit: Explicit) -> Iterator[Explicit]:
    """Make `explicit` current in this thread or task; its state is freed on exit."""
    token = _explicit.set((*_explicit.get(), explicit))
    try:
        yield explicit
    finally:
        _explicit.reset(token)
        explicit.runs.clear()
