"""Values that depend on conditions: decision diagrams, of which equal ones look the same.

A diagram is a leaf, or an `If` on a condition. Conditions are met in one order along every path,
and no `If` has two equal ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from .linear import Linear

__all__ = [
    "AtLeastZero",
    "Condition",
    "Entry",
    "If",
    "TooManyCasesError",
    "Value",
    "combine",
    "holds",
]

MOST_STEPS = 2000


class TooManyCasesError(Exception):
    """A diagram has become too large."""


@dataclass(frozen=True)
class AtLeastZero:
    """The condition that a number is not negative."""

    number: Linear

    def key(self) -> tuple[Any, ...]:
        return (0, "", self.number.terms, self.number.constant)


@dataclass(frozen=True)
class Entry:
    """The entry of a node's value at these indices: a leaf or, where it is bool, a condition."""

    node: fx.Node
    indices: tuple[Linear, ...]

    def key(self) -> tuple[Any, ...]:
        return (1, self.node.name, tuple((each.terms, each.constant) for each in self.indices), 0)


Condition = AtLeastZero | Entry


@dataclass(frozen=True)
class If:
    """What a value is where the condition holds, and where it doesn't."""

    condition: Condition
    yes: Value
    no: Value


Value = bool | int | float | Linear | Entry | If


def holds(number: Linear) -> Value:
    """Whether a number is at least 0, as a diagram."""
    number = number.tightened()
    if not number.terms:
        return number.constant >= 0
    if number.terms[0][1] < 0:  # one condition for itself and its opposite
        return If(AtLeastZero(-number - 1), False, True)
    return If(AtLeastZero(number), True, False)


def combine(function: Callable[..., Value], *values: Value) -> Value:
    """A function of leaves, which may return a diagram, applied to diagrams."""
    known: dict[tuple[Any, ...], Value] = {}

    def of(values: tuple[Value, ...]) -> Value:
        # True, 1 and 1.0 are equal, and not the same leaf.
        key = tuple((type(each), each) for each in values)
        if key in known:
            return known[key]
        if len(known) > MOST_STEPS:
            raise TooManyCasesError
        conditions = [each.condition for each in values if isinstance(each, If)]
        if conditions:
            first = min(conditions, key=lambda each: each.key())
            known[key] = _chosen(
                first, of(_where(values, first, True)), of(_where(values, first, False))
            )
        else:
            known[key] = function(*values)
        return known[key]

    return of(values)


def _where(values: tuple[Value, ...], condition: Condition, holds: bool) -> tuple[Value, ...]:
    return tuple(
        (each.yes if holds else each.no)
        if isinstance(each, If) and each.condition == condition
        else each
        for each in values
    )


def _chosen(condition: Condition, yes: Value, no: Value) -> Value:
    """An `If` in the order of conditions, whatever comes first in its ends."""
    if type(yes) is type(no) and yes == no:
        return yes
    deeper = [each.condition for each in (yes, no) if isinstance(each, If)]
    if all(condition.key() < each.key() for each in deeper):
        return If(condition, yes, no)
    first = min([condition, *deeper], key=lambda each: each.key())
    if first == condition:  # the same condition again: it is decided
        (yes,), (no,) = _where((yes,), condition, True), _where((no,), condition, False)
        return _chosen(condition, yes, no)
    return _chosen(
        first,
        _chosen(condition, *_where((yes, no), first, True)),
        _chosen(condition, *_where((yes, no), first, False)),
    )
