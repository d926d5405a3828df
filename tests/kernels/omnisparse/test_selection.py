"""The selection: budgets, recall, lazy queries, and when attention stays exact."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from accel.kernels.omnisparse import cpu, reference
from accel.kernels.omnisparse.op import attend_with_selection
from accel.kernels.omnisparse.selection import (
    EXACT,
    Choice,
    Selection,
    SelectionSummary,
    segment_count,
    segment_length,
    select,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

LENGTH, WIDTH, SCALE = 2048, 16, 1.0


def planted(columns: list[int], strength: float = 6.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two heads on one key head, whose queries all look at `columns` and a little at the rest."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, 2, LENGTH, WIDTH, generator=generator) * 0.1
    key = torch.randn(1, 1, LENGTH, WIDTH, generator=generator) * 0.1
    query[..., 0] = 1
    key[0, 0, columns, 0] = strength
    return query, key


def chosen(selection: Selection, segment: int = -1) -> list[int]:
    count = int(selection.budget[0, segment])
    found: list[int] = selection.keys[0, 0, segment, :count].tolist()
    return found


def test_the_columns_that_matter_are_found() -> None:
    columns = [40, 100, 333, 500]
    selection = select(*planted(columns, 9.0), None, True, SCALE, Choice(0.9, sinks=2))
    assert chosen(selection)[:6] == [0, 1, *columns]
    assert chosen(selection, 2)[:4] == [0, 1, 40, 100]
    assert chosen(selection, 2)[-1] < 512 - 128  # where the neighbourhood starts
    assert (selection.recall >= 0.9).all()
    sparse = selection.budget[0] != EXACT
    assert sparse.tolist() == [False] * 2 + [True] * 6  # the first ones see too little
    assert selection.needed.amax(1)[0, sparse].equal(selection.budget[0, sparse])


@settings(max_examples=25, deadline=None)
@given(st.floats(0.05, 0.9), st.booleans(), st.integers(0, 5), st.integers(0, 256))
def test_budgets(recall: float, is_causal: bool, sinks: int, window: int) -> None:
    """Every head keeps what was asked, its own budget is the smallest, and keys ascend."""
    query, key = planted([5, 77, 300], 4.0, seed=window)
    choice = Choice(recall, 0.0, 1.0, window, sinks)
    selection = select(query, key, None, is_causal, SCALE, choice)
    smaller = select(query, key, None, is_causal, SCALE, replace(choice, recall=recall / 2))
    assert (selection.recall >= recall - 1e-5).all()
    for segment, count in enumerate(selection.budget[0].tolist()):
        if count == EXACT:
            continue
        keys = chosen(selection, segment)
        assert keys == sorted(set(keys))
        far = min(sinks, max(256 * segment - window, 0))  # the other ones are near
        assert keys[:far] == list(range(far))
        assert count == max(int(selection.needed[0, :, segment].max()), far)
        assert (smaller.needed <= selection.needed)[0, :, segment].all()


def test_recall_is_that_of_the_probe_rows() -> None:
    """Against dense attention: with 32 queries every one is a probe."""
    query, key = planted([3, 200, 201, 400], 3.0)
    query = query[:, :, -32:]
    selection = select(query, key, None, True, SCALE, Choice(0.6, window=64))
    assert chosen(selection)
    active = torch.zeros(1, 2, 32, dtype=torch.bool)
    allowed = reference.visible(*selection[:2], active, None, True, 64)
    scores = query @ key.transpose(-1, -2) * SCALE
    causal = torch.ones(32, LENGTH, dtype=torch.bool).tril(LENGTH - 32)
    attention = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    kept = (attention * allowed).sum(-1).mean(-1)
    torch.testing.assert_close(kept, selection.recall[..., -1])


def test_the_flattest_head_sets_the_budget() -> None:
    query, key = planted([40, 100], 8.0)
    query[:, 1, :, 0] = 0.5  # flatter
    both = select(query, key, None, True, SCALE, Choice(0.6))
    assert both.needed[0, 1, -1] > both.needed[0, 0, -1]
    assert both.budget[0, -1] == both.needed[0, 1, -1]
    lower = select(query, key, None, True, SCALE, Choice(0.6, heads=0.0))
    assert lower.budget[0, -1] == both.needed[0, 0, -1]
    assert lower.recall[0, 1, -1] < 0.6 <= lower.recall[0, 0, -1]


@pytest.mark.parametrize(
    "case",
    ["all asked", "all active", "short", "flat", "not finite in keys", "not finite in queries"],
)
def test_exact(case: str) -> None:
    query, key = planted([40], 8.0)
    choice = Choice()
    if case == "all asked":
        choice = Choice(recall=1.0)
    elif case == "all active":
        choice = Choice(active=1.0)
    elif case == "short":
        query, key = query[:, :, :256], key[:, :, :256]
    elif case == "flat":
        query, key = torch.zeros_like(query), torch.zeros_like(key)
    elif case == "not finite in keys":
        key[0, 0, 7, 3] = torch.nan
    elif case == "not finite in queries":
        query[0, 0, -1, 3] = torch.nan
    selection = select(query, key, None, True, SCALE, choice)
    own = slice(-1, None) if case == "not finite in queries" else slice(None)
    assert (selection.budget[:, own] == EXACT).all()
    assert (selection.recall[..., own] == 1).all()


def test_local_queries_see_the_sinks_only() -> None:
    selection = select(*planted([40, 100]), None, True, SCALE, Choice(lazy="local", sinks=3))
    assert chosen(selection) == [0, 1, 2]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_as_if_it_were_not_there(side: str) -> None:
    """Sinks are the first keys that are none, and budgets do not depend on it."""
    query, key = planted([40, 100, 700], 9.0)
    valid = torch.ones(1, LENGTH, dtype=torch.bool)
    if side == "left":
        valid[:, :512] = False
    else:
        valid[:, 1536:] = False
    choice = Choice(0.8, sinks=2)
    selection = select(query, key, valid, True, SCALE, choice)
    some = chosen(selection, 7 if side == "left" else 5)
    if side == "left":
        assert some[:2] == [512, 513]
        key, query = key[:, :, 512:], query[:, :, 512:]
        plain = select(query, key, None, True, SCALE, choice)
        assert [place - 512 for place in some] == chosen(plain, 5)
    else:
        plain = select(query, key, None, True, SCALE, choice)
        assert some == chosen(plain, 5)
        assert max(chosen(selection)) < 1536


CASES: dict[str, tuple[Choice, int, int]] = {  # with the number of queries and of keys
    "as shipped": (Choice(), 2048, 2048),
    "fewer queries": (Choice(0.5, sinks=2), 300, 1900),
    "one query": (Choice(0.5), 1, 1500),
    "short": (Choice(), 200, 200),
    "more queries": (Choice(), 900, 700),
    "median head": (Choice(0.6, heads=0.5, window=0), 1537, 1537),
    "local": (Choice(lazy="local"), 1100, 1100),
    "everything": (Choice(1.0), 800, 800),
    "flat": (Choice(0.97), 2048, 2048),
}


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", list(CASES))
def test_against_the_reference(name: str, padded: bool, is_causal: bool) -> None:
    choice, queries, keys = CASES[name]
    generator = torch.Generator().manual_seed(5)
    query, key = (
        torch.randn(2, heads, count, WIDTH, generator=generator)
        for heads, count in ((4, queries), (2, keys))
    )
    query = query * torch.tensor([0.5, 1, 2, 3])[:, None, None]  # of several sharpnesses
    valid = torch.ones(2, keys, dtype=torch.bool) if padded else None
    if valid is not None:
        valid[0, : keys // 4], valid[1, -keys // 5 :] = False, False
    got = select(query, key, valid, is_causal, SCALE, choice)
    wanted = Selection(
        *reference.omnisparse_select(query, key, valid, is_causal, SCALE, *choice.selecting())
    )
    assert got.budget.equal(wanted.budget)
    for one, other, budget in zip(got.keys, wanted.keys, got.budget, strict=True):
        for segment, count in enumerate(budget.tolist()):
            assert one[:, segment, : max(count, 0)].equal(other[:, segment, : max(count, 0)])
    torch.testing.assert_close(got.recall, wanted.recall)
    sparse = (got.budget != EXACT)[:, None].expand_as(got.needed)
    assert got.needed[sparse].equal(wanted.needed[sparse])


def test_padded_keys_of_other_queries() -> None:
    """As in cross attention: which queries are padding can't be told from the keys."""
    query, key = planted([40, 100, 700], 9.0)
    valid = torch.ones(1, LENGTH, dtype=torch.bool)
    valid[:, 1200:] = False
    selection = select(query[:, :, :300], key, valid, False, SCALE, Choice(0.8, active=0.0))
    assert set(chosen(selection)) >= {40, 100, 700}


@pytest.mark.parametrize(
    ("queries", "keys", "window"), [(1, 256, 0), (8, 250, 5), (256, 256, 512), (1100, 1100, 4096)]
)
@pytest.mark.parametrize("padded", [False, True])
def test_windows_of_any_width(queries: int, keys: int, window: int, padded: bool) -> None:
    query, key, value = (each[:, :, :keys] for each in needles([]))
    query = query[:, :, -queries:]
    valid = torch.ones(1, keys, dtype=torch.bool) if padded else None
    if valid is not None:
        valid[:, :9] = False
    choice = Choice(0.5, active=0.05, window=window)
    output, *_ = attend_with_selection(query, key, value, valid, None, True, SCALE, choice)
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    mask = mask if valid is None else mask & valid
    wanted = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=SCALE)
    seen = mask.any(-1)
    torch.testing.assert_close(output[:, :, seen], wanted[:, :, seen])


def needles(rows: list[int]) -> list[Tensor]:
    """Queries that look around them, but for some which look at one far key each."""
    generator = torch.Generator().manual_seed(1)
    query, key, value = torch.randn(3, 1, 1, LENGTH, WIDTH, generator=generator).unbind(0)
    query *= 0.3
    for index, row in enumerate(rows):
        query[0, 0, row] = key[0, 0, 20 + 30 * index] * 2
    return [query, key, value]


def test_queries_that_would_miss_much_are_active() -> None:
    rows = [900, 1050, 1277, 1501, 1705, 1900]
    query, key, value = needles(rows)
    choice = Choice(0.5, active=0.05, tail=0)
    output, selection, active = attend_with_selection(
        query, key, value, None, None, True, SCALE, choice
    )
    assert (selection.budget[0, 2:] != EXACT).all()
    assert active[0, 0, rows].all()
    assert int(active.sum()) == math.ceil(0.05 * LENGTH)
    exact = scaled_dot_product_attention(query, key, value, is_causal=True, scale=SCALE)
    torch.testing.assert_close(output[active], exact[active])
    assert not torch.allclose(output[~active], exact[~active])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_active(side: str) -> None:
    query, key, value = needles([1500, 1600])
    valid = torch.ones(1, LENGTH, dtype=torch.bool)
    valid[:, slice(0, 1024) if side == "left" else slice(1700, None)] = False
    choice = Choice(0.5, active=0.05, tail=0)
    *_, active = attend_with_selection(query, key, value, valid, None, True, SCALE, choice)
    assert not active[0, 0, ~valid[0]].any()
    assert active[0, 0, [1500, 1600]].all()
    assert int(active.sum()) == math.ceil(0.05 * LENGTH)


@pytest.mark.parametrize("is_causal", [True, False])
def test_which_queries_may_be_lazy(is_causal: bool) -> None:
    choice = Choice(0.5, active=0.0, span=(512, 900), tail=8)
    *_, active = attend_with_selection(*needles([]), None, None, is_causal, SCALE, choice)
    lazy = active[0, 0].logical_not().nonzero()[:, 0]
    exact = range(512) if is_causal else []  # its segments are short, so that nobody is active
    assert set(lazy.tolist()) - set(exact) == set(range(512, 900))
    assert active[0, 0, 900:].all()


@pytest.mark.parametrize("form", [cpu, reference])
def test_only_visual_queries_may_be_lazy(form: Any) -> None:
    """Each sample has its own; the share that is active is of these."""
    query, key, value = (each.repeat(2, 1, 1, 1) for each in needles([1500, 1600]))
    visual = torch.zeros(2, LENGTH, dtype=torch.bool)
    visual[0, 1024:1800] = visual[1, 1100:1300] = True
    choice = Choice(0.5, active=0.05, tail=0)
    selection = select(query, key, None, True, SCALE, choice)
    function = getattr(form, "forward", None) or form.omnisparse_attend
    *_, active = function(
        query, key, value, *selection[:2], None, visual, True, SCALE, *choice.attending()
    )
    exact = (selection.budget == EXACT).repeat_interleave(256, 1)
    assert active[:, 0][~visual & ~exact].all()
    assert active[0, 0, [1500, 1600]].all()
    for own, looks in zip(active[:, 0], visual, strict=True):
        assert int(own[looks].sum()) == math.ceil(0.05 * int(looks.sum()))


def test_summary() -> None:
    budget = torch.tensor([[EXACT, 100, 200]])
    recall = torch.tensor([[[1.0, 0.95, 0.85], [1.0, 0.99, 0.93], [1.0, 0.99, 0.99]]])
    needed = torch.tensor([[[9, 100, 200], [9, 40, 120], [9, 10, 20]]])
    found = SelectionSummary.of(budget, recall, needed)
    wanted = {"exact": 1 / 3, "budget": 150, "flattest": 150, "median": 80, "recall": 0.9}
    assert asdict(found) == pytest.approx(wanted)
    exact = SelectionSummary.of(torch.full((1, 2), EXACT), torch.ones(1, 3, 2), needed[..., :2])
    assert (exact.exact, exact.recall) == (1, 1)
    assert math.isnan(exact.budget)


@pytest.mark.parametrize("keys", [1, 255, 256, 257, 16383, 16384, 16385, 100_000, 10**6])
def test_segments(keys: int) -> None:
    length, count = segment_length(keys), segment_count(keys)
    assert length % 256 == 0
    assert count <= 64
    assert (count - 1) * length < keys <= count * length
