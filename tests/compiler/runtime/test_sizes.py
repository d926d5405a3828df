"""Sizes survive being written down, and nothing but a size is evaluated."""

from __future__ import annotations

from typing import Any

import pytest
from accel import AccelError
from accel.compiler.runtime.sizes import evaluate, size_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.symbolic_shapes import ShapeEnv

SIZES = st.integers(2, 4096)


def symbols(**hints: int) -> dict[str, Any]:
    """Symbolic integers as torch makes them."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    environment = ShapeEnv()
    made = {}
    for name, hint in hints.items():
        source = ConstantSource(name)
        symbol = environment.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
        made[name] = environment.create_symintnode(symbol, hint=hint, source=source)
    return made


@settings(deadline=None)
@given(SIZES, SIZES)
def test_an_expression_survives(height: int, width: int) -> None:
    made = symbols(height=16, width=24)
    h, w = made["height"], made["width"]
    values = {str(h): height, str(w): width}
    for symbolic, plain in [
        (h, height),
        ((h // 2) * (w // 2), (height // 2) * (width // 2)),
        (h * w + 3 - w, height * width + 3 - width),
        ((h + 1) % 7, (height + 1) % 7),
        (h * h * 2, height * height * 2),
    ]:
        text = size_of(symbolic)
        assert isinstance(text, str)
        assert evaluate(text, values) == plain


@given(SIZES, SIZES)
def test_conditions(left: int, right: int) -> None:
    values = {"a": left, "b": right}
    for text, expected in [
        ("a // 2 == 4", left // 2 == 4),
        ("a < b <= 4096 and not a == b", left < right <= 4096),
        ("a != b or max(a, b) > -b", True),
    ]:
        assert evaluate(text, values) == expected


def test_plain_numbers_stay() -> None:
    assert size_of(7) == 7
    assert evaluate(7, {}) == 7


@pytest.mark.parametrize(
    "text",
    ["__import__('os').getcwd()", "s0.real", "s0 ** 99", "unknown", "1 // 0", "1.5", "True", "",
     "max()", "max(s0, key=s0)", "(", "-" * 100_000 + "1", "[s0][0]", "s0 if s0 else 1", "s0 in s0",
     "s0 is s0"],
)  # fmt: skip
def test_nothing_else_is_evaluated(text: str) -> None:
    with pytest.raises(AccelError, match="no expression of sizes"):
        evaluate(text, {"s0": 4})
