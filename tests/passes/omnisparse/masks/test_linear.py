"""What is said to be contradictory is so; and what has to be shown for masks is."""

from __future__ import annotations

from itertools import product

from accel.passes.omnisparse.masks.cases import If, Value, combine, holds
from accel.passes.omnisparse.masks.linear import Linear, contradictory
from hypothesis import given
from hypothesis import strategies as st

QUERY, KEY, SIZE = (Linear.of(name) for name in ("query", "key", "size"))
factors = st.integers(-4, 4)
numbers = st.builds(
    lambda one, two, three, constant: QUERY * one + KEY * two + SIZE * three + constant,
    factors, factors, factors, st.integers(-9, 9),
)  # fmt: skip
POINTS = [dict(zip(("query", "key", "size"), point, strict=True))
          for point in product(range(-3, 7), repeat=3)]  # fmt: skip


def at(number: Linear, point: dict[str, int]) -> int:
    return number.constant + sum(point[name] * factor for name, factor in number.terms)


@given(conditions=st.lists(numbers, max_size=6))
def test_no_point_meets_what_is_contradictory(conditions: list[Linear]) -> None:
    if contradictory(conditions):
        assert not any(all(at(each, point) >= 0 for each in conditions) for point in POINTS)


def test_contradictions() -> None:
    within = [QUERY, KEY, SIZE - 1 - QUERY, SIZE - 1 - KEY]
    assert contradictory([*within, QUERY - SIZE])
    assert contradictory([QUERY - KEY, KEY - QUERY - 1])
    assert contradictory([QUERY * 2 - KEY * 2 - 1, KEY - QUERY])  # of whole numbers only
    assert not contradictory([*within, QUERY - KEY - 1000])
    assert not contradictory(within)


def decided(value: Value, point: dict[str, int]) -> Value:
    while isinstance(value, If):
        value = value.yes if at(value.condition.number, point) >= 0 else value.no
    return value


@given(one=numbers, other=numbers, third=numbers)
def test_diagrams_are_what_they_are_made_of(one: Linear, other: Linear, third: Linear) -> None:
    def build(first: bool, second: bool) -> Value:
        return holds(third) if first and not second else second

    found = combine(build, holds(one), holds(other))
    for point in POINTS[::7]:
        first, second, last = (at(each, point) >= 0 for each in (one, other, third))
        assert decided(found, point) == (last if first and not second else second)
    assert combine(lambda a, b: a or b, holds(one), holds(-one - 1)) is True
