"""Nested values survive being taken apart."""

from __future__ import annotations

from typing import Any

from accel.compiler.export.paths import flatten, nested
from hypothesis import given
from hypothesis import strategies as st

LEAVES = st.none() | st.booleans() | st.integers() | st.text()
NAMES = st.text(min_size=1)
VALUES: Any = st.recursive(
    LEAVES,
    lambda inner: (
        st.dictionaries(NAMES, inner, min_size=1) | st.lists(inner, min_size=1).map(tuple)
    ),
    max_leaves=12,
)


@given(VALUES)
def test_apart_and_together(value: Any) -> None:
    assert nested(dict(flatten(value))) == value
