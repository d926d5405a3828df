"""Attention of one query, opened into multiplications and sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accel.passes.codebook.single_query import open_single_queries
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..counting import counting

KEYS = 5


def opened(function: Callable[..., Tensor], *given: Tensor | None, dynamic: bool = False) -> int:
    """How many were opened, of a graph that computes the same before and after."""
    backend, counts = counting(lambda graph: len(open_single_queries(graph)))
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(compiled(*given), function(*given))
    return sum(counts)


def heads(length: int, batch: int = 1, size: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 2, length, size, dtype=dtype)


def masks() -> dict[str, Tensor | None]:
    some = torch.rand(1, 2, 1, KEYS) > 0.4
    some[..., 0] = True
    return {
        "none": None, "bool": some, "for all heads": some[:, :1], "of two dimensions": some[0, 0],
        "added": torch.randn(1, 1, 1, KEYS), "nothing is seen": torch.zeros_like(some),
    }  # fmt: skip


@pytest.mark.parametrize("name", masks())
@torch.no_grad()
def test_values(name: str) -> None:
    mask, query, key, value = masks()[name], heads(1), heads(KEYS), heads(KEYS, size=3)
    assert opened(lambda *given: scaled_dot_product_attention(*given), query, key, value, mask) == 1


@torch.no_grad()
def test_three_dimensions() -> None:
    query, key = heads(1)[0], heads(KEYS)[0]
    assert opened(lambda q, k: scaled_dot_product_attention(q, k, k), query, key) == 1


@pytest.mark.parametrize(
    ("query", "key"),
    [
        (heads(2), heads(KEYS)),
        (heads(1, batch=2), heads(KEYS, batch=2)),
        (heads(1, dtype=torch.bfloat16), heads(KEYS, dtype=torch.bfloat16)),
        (heads(1, size=64), heads(1025, size=64)),
    ],
    ids=["queries", "users", "half precision", "many keys"],
)
@torch.no_grad()
def test_what_stays(query: Tensor, key: Tensor) -> None:
    assert opened(lambda q, k: scaled_dot_product_attention(q, k, k), query, key) == 0


@pytest.mark.parametrize("named", [{"scale": 2.0}, {"is_causal": True}, {"dropout_p": 0.0}])
@torch.no_grad()
def test_other_forms_stay(named: dict[str, Any]) -> None:
    query, key = heads(1), heads(KEYS)
    assert opened(lambda q, k: scaled_dot_product_attention(q, k, k, **named), query, key) == 0


@torch.no_grad()
def test_sizes_that_are_not_known() -> None:
    query, key = heads(1), heads(KEYS)
    assert opened(lambda q, k: scaled_dot_product_attention(q, k, k), query, key, dynamic=True) == 0
