"""The selection: budgets, recall, lazy queries, and when attention stays exact."""

from __future__ import annotations

import pytest
import torch
from accel.kernels.omnisparse import reference
from accel.kernels.omnisparse.selection import Choice, Selection, select
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

LENGTH, WIDTH, SCALE = 1024, 16, 1.0


def planted(columns: list[int], strength: float = 6.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two heads on one key head, whose queries all look at `columns` and a little at the rest."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, 2, LENGTH, WIDTH, generator=generator) * 0.1
    key = torch.randn(1, 1, LENGTH, WIDTH, generator=generator) * 0.1
    query[..., 0] = 1
    key[0, 0, columns, 0] = strength
    return query, key


def chosen(selection: Selection) -> list[int]:
    found: list[int] = selection.keys[0, 0, : int(selection.budget)].tolist()
    return found


def test_the_columns_that_matter_are_found() -> None:
    columns = [40, 100, 333, 500]
    selection = select(*planted(columns, 9.0), True, SCALE, Choice(0.9, sinks=2))
    assert chosen(selection)[:6] == [0, 1, *columns]
    assert selection.recall.min() >= 0.9
    assert int(selection.budget) == selection.needed.max()


@given(st.floats(0.05, 0.9), st.booleans(), st.integers(0, 5), st.integers(0, 256))
def test_budgets(recall: float, is_causal: bool, sinks: int, window: int) -> None:
    """Every head keeps what was asked, its own budget is the smallest, and keys ascend."""
    query, key = planted([5, 77, 300], 4.0, seed=window)
    selection = select(query, key, is_causal, SCALE, Choice(recall, 1.0, window, sinks))
    count = int(selection.budget)
    keys = chosen(selection)
    assert keys == sorted(set(keys))
    assert sorted(selection.keys[0, 0].tolist()) == list(range(LENGTH))
    assert (selection.recall >= recall - 1e-5).all()
    if count < LENGTH:
        assert keys[:sinks] == list(range(sinks))
        assert count == selection.needed.max()
        smaller = select(query, key, is_causal, SCALE, Choice(recall / 2, 1.0, window, sinks))
        assert smaller.needed.max() <= count


def test_recall_is_that_of_the_probe_rows() -> None:
    """Against dense attention: with 64 queries every one is a probe."""
    query, key = planted([3, 200, 201, 400], 3.0)
    query = query[:, :, -64:]
    selection = select(query, key, True, SCALE, Choice(0.6, window=64))
    assert int(selection.budget) < LENGTH
    allowed = reference.visible(selection, 64, True, 64, 4)
    scores = query @ key.transpose(-1, -2) * SCALE
    causal = torch.ones(64, LENGTH, dtype=torch.bool).tril(LENGTH - 64)
    attention = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    kept = (attention * allowed).sum(-1).mean(-1)
    torch.testing.assert_close(kept, selection.recall)


def test_the_flattest_head_sets_the_budget() -> None:
    query, key = planted([40, 100], 8.0)
    query[:, 1, :, 0] = 0.5  # flatter
    both = select(query, key, True, SCALE, Choice(0.6))
    assert both.needed[0, 1] > both.needed[0, 0]
    assert int(both.budget) == both.needed[0, 1]
    lower = select(query, key, True, SCALE, Choice(0.6, heads=0.0))
    assert int(lower.budget) == both.needed[0, 0]
    assert lower.recall[0, 1] < 0.6 <= lower.recall[0, 0]


@pytest.mark.parametrize(
    "case", ["all asked", "short", "flat", "not finite in keys", "not finite in queries"]
)
def test_exact(case: str) -> None:
    query, key = planted([40], 8.0)
    recall = 1.0 if case == "all asked" else 0.9
    if case == "short":
        query, key = query[:, :, :512], key[:, :, :512]
    elif case == "flat":
        query, key = torch.zeros_like(query), torch.zeros_like(key)
    elif case == "not finite in keys":
        key[0, 0, 7, 3] = torch.nan
    elif case == "not finite in queries":
        query[0, 0, -1, 3] = torch.nan
    selection = select(query, key, True, SCALE, Choice(recall, span=(0, 400)))
    assert int(selection.budget) == key.shape[2]
    assert selection.active.all()
    assert (selection.recall == 1).all()


@pytest.mark.parametrize(("is_causal", "sinks"), [(True, 4), (False, 4), (True, 0)])
def test_lazy_queries(is_causal: bool, sinks: int) -> None:
    """Rows that look at their neighbours only, in the span that was named."""
    query, key = planted([40, 100], 8.0)
    tiles = torch.arange(LENGTH) // 128
    key[0, 0, :, 1:9] += 8.0 * torch.nn.functional.one_hot(tiles, 8)  # each tile's own direction
    local = torch.zeros(LENGTH, dtype=torch.bool)
    local[300:350] = True
    query[:, :, local, 0] = 0
    query[:, :, local, 1:9] += 4.0 * torch.nn.functional.one_hot(tiles[local], 8)
    selection = select(query, key, is_causal, SCALE, Choice(0.6, sinks=sinks, span=(256, 640)))
    assert int(selection.budget) < LENGTH
    assert selection.active[0, 0].logical_not().equal(local)
    nowhere = select(query, key, is_causal, SCALE, Choice(0.6))
    assert nowhere.active.all()
