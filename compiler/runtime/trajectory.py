"""`accel.trajectory`: a sampling run that the caller vouches for."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass, field

from .runs import Runs

__all__ = ["Explicit", "current_explicit", "enter_explicit"]


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
