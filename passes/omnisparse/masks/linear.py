"""Whole numbers that are linear in indices and sizes, and whether conditions on them can hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Linear", "contradictory", "size_of"]

MOST_CONDITIONS = 400  # beyond which nothing is shown


@dataclass(frozen=True)
class Linear:
    """The sum of `factor * variable` over `terms`, sorted by variable, and a constant."""

    terms: tuple[tuple[str, int], ...] = ()
    constant: int = 0

    @staticmethod
    def of(variable: str) -> Linear:
        return Linear(((variable, 1),))

    def __add__(self, other: Linear | int) -> Linear:
        if isinstance(other, int):
            return Linear(self.terms, self.constant + other)
        factors = dict(self.terms)
        for variable, factor in other.terms:
            factors[variable] = factors.get(variable, 0) + factor
        return _linear(factors, self.constant + other.constant)

    def __mul__(self, number: int) -> Linear:
        factors = {variable: factor * number for variable, factor in self.terms}
        return _linear(factors, self.constant * number)

    def __neg__(self) -> Linear:
        return self * -1

    def __sub__(self, other: Linear | int) -> Linear:
        return self + -other

    def variables(self) -> set[str]:
        return {variable for variable, _ in self.terms}

    def bounds(self, ranges: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
        """The least and the greatest that it can be, if all variables are within their ranges."""
        least = greatest = self.constant
        for variable, factor in self.terms:
            ends = sorted(factor * end for end in ranges[variable])
            least, greatest = least + ends[0], greatest + ends[1]
        return least, greatest

    def tightened(self) -> Linear:
        """What is at least 0 for the same whole numbers, with the smallest factors."""
        divisor = math.gcd(*(factor for _, factor in self.terms))
        if divisor <= 1:
            return self
        terms = tuple((variable, factor // divisor) for variable, factor in self.terms)
        return Linear(terms, self.constant // divisor)


def _linear(factors: Mapping[str, int], constant: int) -> Linear:
    return Linear(tuple(sorted(each for each in factors.items() if each[1])), constant)


def size_of(size: Any) -> Linear | None:
    """A size as a linear form of the graph's symbols; None where it is none."""
    if isinstance(size, int):
        return Linear((), int(size))
    if not isinstance(size, torch.SymInt):
        return None
    factors: dict[str, int] = {}
    constant = 0
    for term, factor in size.node.expr.as_coefficients_dict().items():
        if not factor.is_integer:
            return None
        if term.is_Symbol:
            factors[str(term)] = int(factor)
        elif term.is_number and (factor * term).is_integer:
            constant += int(factor * term)
        else:
            return None
    return _linear(factors, constant)


def contradictory(conditions: Iterable[Linear]) -> bool:
    """Whether it is shown that no whole numbers make all conditions at least 0.

    By Fourier's and Motzkin's elimination: a variable is removed by adding each condition that
    bounds it from below to each that bounds it from above.
    """
    rows = {each.tightened() for each in conditions}
    while rows:
        if any(row.constant < 0 for row in rows if not row.terms):
            return True
        above: dict[str, list[Linear]] = {}
        below: dict[str, list[Linear]] = {}
        for row in rows:
            for variable, factor in row.terms:
                (below if factor > 0 else above).setdefault(variable, []).append(row)
        variables = set(above) | set(below)
        if not variables:
            return False
        chosen = min(
            sorted(variables), key=lambda each: len(above.get(each, ())) * len(below.get(each, ()))
        )
        kept = {row for row in rows if chosen not in row.variables()}
        for low in below.get(chosen, ()):
            for high in above.get(chosen, ()):
                one, other = dict(low.terms)[chosen], -dict(high.terms)[chosen]
                kept.add((low * other + high * one).tightened())
        if len(kept) > MOST_CONDITIONS:
            return False
        rows = kept
    return False
