"""Masks that a graph builds from sizes: which are recognised, and why the others are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accel
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


def lower(x: Tensor) -> Tensor:
    row = torch.arange(x.shape[1])
    return row[None, :] <= row[:, None]


def sliding(x: Tensor) -> Tensor:
    """Wider than the sequences of the tests."""
    row = torch.arange(x.shape[1])
    return lower(x) & (row[None, :] > row[:, None] - 100)


def assigned(x: Tensor) -> Tensor:
    mask = lower(x)
    mask[:, 5:9] = False
    return mask


def filled(x: Tensor) -> Tensor:
    mask = lower(x)
    mask[3:].t()[0].fill_(False)  # a view of a view
    return mask


def changed_by_operators(x: Tensor) -> Tensor:
    """As torch.export may write it."""
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    torch.ops.aten.fill_.Scalar(torch.ops.aten.slice.Tensor(mask, 1, 3, 9), False)
    return mask


def written_by_operators(x: Tensor) -> Tensor:
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    torch.ops.aten.logical_and.out(lower(x), lower(x).tril(-10), out=mask[:, :])
    return mask


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "lower": lower,
    "tril": lambda x: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(),
    "scores": lambda x: torch.zeros(x.shape[1], x.shape[1]).masked_fill(~lower(x), -torch.inf),
    "sliding": sliding,
    "assigned": assigned,
    "filled": filled,
    "narrow": lambda x: lower(x) & ~lower(x).tril(-10),
    "slope": lambda x: -torch.arange(x.shape[1]).float().expand(x.shape[1], -1),
    "data": lambda x: lower(x) & (x[:, None, None, :, 0] > 0),
    "rows": lambda x: lower(x) & (x[:, None, :, :1] > 0),
    "operators": changed_by_operators,
    "out": written_by_operators,
    "everything": lambda x: lower(x) | ~lower(x),
}


class Masked(nn.Module):
    def __init__(self, mask: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mask = mask
        self.project = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.project(x)[:, None]
        return scaled_dot_product_attention(heads, heads, heads, attn_mask=self.mask(x))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lower", ""), ("tril", ""), ("scores", ""), ("everything", ""),
        ("narrow", "neither causal nor empty"), ("slope", "by other amounts"),
        ("data", ""), ("rows", "depends on l_x_"), ("assigned", "changed in place"),
        ("filled", "changed in place"), ("operators", "changed in place"),
        ("out", "changed in place"),
    ],
)  # fmt: skip
@torch.no_grad()
def test_masks(name: str, reason: str, dynamic: bool) -> None:
    model = Masked(MASKS[name])
    options: dict[str, Any] = {"omnisparse": {"recall": 1.0, "minimum": 0}, "lowering": "eager"}
    fast = torch.compile(model, backend="accel", fullgraph=True, dynamic=dynamic, options=options)
    for length in (40, 50):
        x = torch.randn(2, length, 8)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    found = accel.report_of(fast).passes["omnisparse"]
    assert bool(found.matched) == (not reason)
    if reason:
        assert reason in str(found.skipped[0])
    if dynamic:
        assert accel.stats(fast).recompiles == 0


@torch.no_grad()
def test_a_window_wider_than_the_sequence_shows_where_sizes_are_free() -> None:
    options: dict[str, Any] = {"omnisparse": {"recall": 1.0, "minimum": 0}, "lowering": "eager"}
    for dynamic, reason in ((False, ""), (True, "neither causal nor empty")):
        model = Masked(sliding)
        fast = torch.compile(model, backend="accel", dynamic=dynamic, options=options)
        for length in (40, 300):
            x = torch.randn(2, length, 8)
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
        found = accel.report_of(fast).passes["omnisparse"]
        assert reason in "; ".join(map(str, found.skipped))


PADDED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "causal": lambda x, there: lower(x) & there.bool()[:, None, None],
    "full": lambda x, there: (there != 0)[:, None, None].expand(-1, 1, x.shape[1], -1),
    "scores": lambda x, there: torch.zeros(x.shape[1], x.shape[1]).masked_fill(
        ~(lower(x) & there.bool()[:, None, None]), -1e30
    ),
    "packed": lambda x, there: lower(x) & (there[:, None, :, None] == there[:, None, None]),
    "of rows": lambda x, there: lower(x) & there.bool()[:, None, :, None],
    "reversed": lambda x, there: lower(x) & (there == 0)[:, None, None],
    "unless nothing is left": lambda x, there: (
        (lower(x) & there.bool()[:, None, None])
        | ~(lower(x) & there.bool()[:, None, None]).any(-1, keepdim=True)
    ),
    "causally": lambda x, there: (lower(x) & ~lower(x).tril(-3)) & (there != 0)[:, None, None],
    "by size": lambda x, there: torch.where(
        lower(x) & (there != 0)[:, None, None], torch.tensor(0.0), torch.tensor(-2e4)
    ),
    "twice": lambda x, there: (
        torch.zeros(x.shape[1], x.shape[1]).masked_fill(~lower(x), -1e30)
        + torch.zeros(there.shape).masked_fill(there == 0, -1e30)[:, None, None]
    ),
    "minus infinity": lambda x, there: (
        torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)
        + torch.zeros(there.shape).masked_fill(there == 0, -torch.inf)[:, None, None]
    ),
    "two of them": lambda x, there: (
        lower(x) & ((there != 0)[:, None, None] & (there != 5)[:, None, None])
    ),
    "one minus": lambda x, there: (
        (1.0 - (there > 0).float()[:, None, None].expand(-1, 1, x.shape[1], -1))
        * torch.finfo(torch.float32).min
    ),
    "summed": lambda x, there: lower(x) & (there.cumsum(1) > 0)[:, None, None],
}


class Padded(nn.Module):
    def __init__(self, mask: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.mask = mask
        self.project = nn.Linear(8, 8)

    def forward(self, x: Tensor, there: Tensor) -> Tensor:
        heads = self.project(x)[:, None]
        return scaled_dot_product_attention(heads, heads, heads, attn_mask=self.mask(x, there))


REFUSED = {
    "packed": "depends on l_there_, which hides other keys than its own",
    "of rows": "depends on l_there_, which hides other keys than its own",
    "unless nothing is left": "no rule says what any_1 (any) is",
    "causally": "neither causal nor empty",
    "by size": "a query of which all keys are hidden sees them",
    "twice": "hides some keys more than others",
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", list(PADDED))
@torch.no_grad()
def test_padding(name: str, dynamic: bool) -> None:
    """Entries of a table may hide keys, by whatever the graph makes of them, but from all queries
    alike. Also what queries give that see nothing is the plain model's."""
    model = Padded(PADDED[name])
    options: dict[str, Any] = {"omnisparse": {"recall": 1.0, "minimum": 0}, "lowering": "eager"}
    fast = torch.compile(model, backend="accel", fullgraph=True, dynamic=dynamic, options=options)
    generator = torch.Generator().manual_seed(0)
    for length in (40, 50):
        x = torch.randn(3, length, 8)
        there = torch.randint(-2, 8, (3, length), generator=generator)
        there[0, :9], there[1, -5:], there[2] = 0, 0, 0
        torch.testing.assert_close(fast(x, there), model(x, there), rtol=1e-4, atol=1e-5)
    found = accel.report_of(fast).passes["omnisparse"]
    assert bool(found.matched) == (name not in REFUSED)
    assert found.matched or REFUSED[name] in str(found.skipped[0])
