"""Selections of one row, moved to before what would compute all rows."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accel.passes.blocks import where_of
from accel.passes.codebook.rows import select_early
from torch import Tensor, fx, nn
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

from ..counting import counting

WEIGHT, BIAS = torch.randn(6, 6), torch.randn(6)
MASK = torch.rand(2, 1, 5, 5) > 0.3


def moved(function: Callable[[Tensor], Any], given: Tensor, dynamic: bool = False) -> int:
    """How many operations were moved, of a graph that computes the same before and after."""
    backend, counts = counting(select_early)
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)
    if dynamic:
        torch._dynamo.mark_dynamic(given, 1)
        compiled = torch.compile(function, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(given), function(given))
    if dynamic:
        longer = torch.cat([given, given], 1)
        torch.testing.assert_close(compiled(longer), function(longer))
    assert len(counts) == 1
    return counts[0]


def block(x: Tensor) -> Tensor:
    x = x + linear(layer_norm(x, (6,)), WEIGHT, BIAS)
    return x + linear(gelu(linear(layer_norm(x, (6,)), WEIGHT), approximate="tanh"), WEIGHT)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("place", [-1, 0, 3])
@torch.no_grad()
def test_a_block(place: int, dynamic: bool) -> None:
    assert moved(lambda x: block(x)[:, place], torch.randn(2, 5, 6), dynamic) == 8


@pytest.mark.parametrize("place", [-1, 0, 3, -2])
@torch.no_grad()
def test_attention(place: int) -> None:
    def function(x: Tensor) -> Tensor:
        heads = linear(x, WEIGHT).unflatten(2, (2, 3)).transpose(1, 2)
        seen = scaled_dot_product_attention(heads, heads, heads, MASK[:, :, : x.shape[1]])
        return linear(seen.transpose(1, 2).flatten(2), WEIGHT)[:, place]

    # The projection, the view, its transposition, and attention; not what keys come from.
    assert moved(function, torch.randn(2, 5, 6)) == 4


@pytest.mark.parametrize("shape", [(5, 5), (1, 5), (2, 1, 5)])
@torch.no_grad()
def test_masks(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) > 0.3
    mask[..., 0] = True
    assert moved(
        lambda x: scaled_dot_product_attention(x, x, x, mask)[:, 3], torch.randn(2, 5, 6)
    ) == 1  # fmt: skip


@torch.no_grad()
def test_modules_are_remembered() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    seen = []

    def backend(module: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        select_early(module.graph)
        seen.extend(map(where_of, module.graph.nodes))
        return module

    torch.compile(lambda x: model(x)[:, 1], backend=backend, fullgraph=True)(torch.randn(2, 5, 6))
    assert any(re.match(r".*0 \(\w+\)$", each) for each in seen)


@pytest.mark.parametrize(
    "other",
    [torch.randn(6), torch.randn(5, 6), torch.randn(1, 6), torch.randn(2, 1, 6),
     torch.randn(1, 5, 1), torch.tensor(2.0), 3.0],
    ids=lambda each: str(list(each.shape)) if isinstance(each, Tensor) else "number",
)  # fmt: skip
@pytest.mark.parametrize("swapped", [False, True])
@torch.no_grad()
def test_operands_that_are_broadcast(other: Any, swapped: bool) -> None:
    def function(x: Tensor) -> Tensor:
        return (other * x if swapped else x * other)[:, 2]

    assert moved(function, torch.randn(2, 5, 6)) == 1


@torch.no_grad()
def test_an_operand_that_is_broadcast_to_others() -> None:
    assert moved(lambda x: (x[:, :1] - x)[:, 3], torch.randn(2, 5, 6)) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x: linear(x, WEIGHT)[..., 0],
        lambda x: linear(x, WEIGHT)[:, :, 2],
        lambda x: layer_norm(x, (5, 6))[:, 1],
        lambda x: x.softmax(1)[:, 1],
        lambda x: x.exp()[:, 1:],
        lambda x: (lambda y: y[:, 1] + y[:, 2])(x.exp()),
        lambda x: (lambda y: y[:, 1] + y.sum(1))(x.exp()),
        lambda x: scaled_dot_product_attention(x, x, x, is_causal=True)[:, 3],
        lambda x: x.transpose(0, 2)[:, 3].contiguous(),
        lambda x: x.exp()[:, None],
        lambda x: x.transpose(dim0=1, dim1=2)[:, 3],
        lambda x: x.unflatten(2, (2, 3)).exp().flatten(2, end_dim=3)[:, 1],
        lambda x: nn.functional.relu(x * 1, inplace=True)[:, 1],
    ],
)
@torch.no_grad()
def test_what_stays(function: Callable[[Tensor], Any]) -> None:
    assert moved(function, torch.randn(2, 5, 6)) == 0


@torch.no_grad()
def test_changes_in_place_keep_their_place() -> None:
    def function(x: Tensor) -> Tensor:
        own = x.clone()
        before = own.exp()[:, 1]
        own.fill_(2)
        after = own.exp()[:, 1]
        after.add_(1)
        return before + after

    assert moved(function, torch.randn(2, 5, 6)) == 2


@torch.no_grad()
def test_dropout_that_is_off() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)).eval()
    assert moved(lambda x: model(x)[:, 1], torch.randn(2, 5, 6)) == 2
