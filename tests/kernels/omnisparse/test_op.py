"""The operators against the float64 reference, as torch sees them, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import accel
import pytest
import torch
from accel.kernels.omnisparse import cpu, omnisparse_attention, reference
from accel.kernels.omnisparse.selection import (
    EXACT,
    Choice,
    neighbourhood,
    segment_count,
    segment_length,
    select,
)
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

WINDOW, SINKS = 16, 2
LAZY = (0.0, WINDOW, 0, -1, 0)  # no query is active


def inputs(
    heads: int, groups: int, queries: int, keys: int, width: int, dtype: torch.dtype, batch: int = 2
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries * 7 + width)
    shapes = [(batch, heads, queries, width), *[(batch, groups, keys, width)] * 2]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def random_selection(
    groups: int, keys: int, is_causal: bool, valid: Tensor | None, batch: int = 2
) -> tuple[Tensor, Tensor]:
    """Another set of keys in each head and segment, and every fourth segment exact."""
    generator = torch.Generator().manual_seed(keys)
    segments = segment_count(keys)
    place, first = torch.arange(keys), segment_length(keys) * torch.arange(segments)[:, None]
    start, stop = neighbourhood(first, keys, WINDOW, False)
    usable = (place < start) | ((place >= stop) & (not is_causal))  # [S, M]: far keys
    usable = usable.expand(batch, -1, -1) & (True if valid is None else valid[:, None])
    count = usable.sum(-1)
    budget = (torch.rand(count.shape, generator=generator) * (count + 1)).long()
    order = torch.rand(batch, groups, segments, keys, generator=generator)
    order = order.masked_fill(~usable[:, None], -1).argsort(-1, descending=True)
    chosen = order.masked_fill(place >= budget[:, None, :, None], keys).sort(-1).values
    budget[:, 3::4] = EXACT
    return chosen.int(), budget.int()


def some_padding(batch: int, keys: int) -> Tensor:
    """On the left of the first sample, on the right of the second, and nothing left of the last."""
    valid = torch.ones(batch, keys, dtype=torch.bool)
    valid[0, : keys // 3] = False
    valid[1, -(keys // 4) :] = False
    valid[2:] = False
    return valid


def expected(
    tensors: list[Tensor], allowed: Tensor, scale: float, gradient: Tensor
) -> list[Tensor]:
    """Result, log-sum-exp and gradients by the reference in float64."""
    query, key, value = (each.detach().double().requires_grad_() for each in tensors)
    output, total = reference.attend(query, key, value, allowed, scale)
    return [output, total, *torch.autograd.grad(output, [query, key, value], gradient.double())]


def relative(got: Tensor, wanted: Tensor) -> float:
    """Of the finite numbers; which are not has to be the same."""
    finite = wanted.isfinite()
    assert got.isfinite().equal(finite)
    got, wanted = got.detach().double()[finite], wanted.detach()[finite]
    return float((got - wanted).norm() / wanted.norm().clamp(min=1))


def check(
    tensors: list[Tensor], padded: bool, is_causal: bool, active: float, limit: float
) -> Tensor:
    """Values and gradients against the reference; which queries were active."""
    query, key, _ = tensors
    valid = some_padding(len(key), key.shape[2]) if padded else None
    keys, budget = random_selection(key.shape[1], key.shape[2], is_causal, valid, len(key))
    gradient, scale = torch.randn_like(query), 1 / math.sqrt(query.shape[-1])
    output, total, chosen = torch.ops.accel.omnisparse_attend(
        *tensors, keys, budget, valid, None, is_causal, scale, active, WINDOW, 0, -1, 1
    )
    got = [output, total, *torch.autograd.grad(output, tensors, gradient)]
    allowed = reference.visible(keys, budget, chosen, valid, is_causal, WINDOW)
    for one, other in zip(got, expected(tensors, allowed, scale, gradient), strict=True):
        assert relative(one, other) < limit
    return chosen


SHAPES = [
    (1, 1, 1, 1, 32), (4, 2, 63, 63, 64), (8, 1, 65, 65, 32), (2, 2, 1000, 1000, 64),
    (6, 2, 300, 1000, 128), (2, 1, 1, 700, 256), (3, 3, 129, 513, 48),
]  # fmt: skip


@pytest.mark.parametrize("active", [0.0, 0.2])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("heads", "groups", "queries", "keys", "width"), SHAPES)
def test_values_and_gradients(
    heads: int, groups: int, queries: int, keys: int, width: int, is_causal: bool, padded: bool,
    active: float,
) -> None:  # fmt: skip
    tensors = inputs(heads, groups, queries, keys, width, torch.float32, batch=3 if padded else 2)
    chosen = check(tensors, padded, is_causal, active, 1e-5)
    if queries > 128 and not padded:
        assert bool(chosen.any()) or not active
        assert not chosen.all()


@pytest.mark.parametrize("padded", [False, True])
def test_more_queries_than_keys(padded: bool) -> None:
    """As in cross attention; queries that precede all keys count to the first segment."""
    tensors = inputs(4, 2, 900, 300, 32, torch.float32, batch=3 if padded else 2)
    check(tensors, padded, False, 0.2, 1e-5)
    query, key, value = (each.detach() for each in tensors)
    valid = some_padding(len(key), 300) if padded else None
    mask = None if valid is None else valid[:2, None, None]
    wanted = scaled_dot_product_attention(
        query[:2], key[:2], value[:2], attn_mask=mask, enable_gqa=True
    )
    got = omnisparse_attention(query, key, value, valid=valid, recall=0.5)
    torch.testing.assert_close(got[:2], wanted)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_low_precision(dtype: torch.dtype, limit: float) -> None:
    """To the rounding of results (bfloat16: 2^-8); sums are in float32."""
    tensors = inputs(4, 2, 300, 300, 64, dtype)
    check(tensors, False, True, 0.1, limit)


@pytest.mark.parametrize("settings", [{"recall": 1.0}, {"active": 1.0}])
@pytest.mark.parametrize("is_causal", [True, False])
def test_everything_is_dense_attention(is_causal: bool, settings: dict[str, Any]) -> None:
    tensors = inputs(4, 2, 600, 600, 32, torch.float32)
    got = omnisparse_attention(*tensors, is_causal=is_causal, **settings)
    wanted = scaled_dot_product_attention(*tensors, is_causal=is_causal, enable_gqa=True)
    torch.testing.assert_close(got, wanted)
    gradient = torch.randn_like(got)
    gradients = torch.autograd.grad(got, tensors, gradient)
    for one, other in zip(gradients, torch.autograd.grad(wanted, tensors, gradient), strict=True):
        torch.testing.assert_close(one, other)


def test_every_key_selected_segment_by_segment() -> None:
    """What a budget that keeps everything computes by the sparse way."""
    query, key, value = (each.detach() for each in inputs(4, 2, 200, 600, 32, torch.float32))
    full = select(query, key, None, True, 0.2, Choice(recall=1.0))
    output, *_ = cpu.forward(query, key, value, *full[:2], None, None, True, 0.2, *LAZY)
    mask = torch.ones(200, 600, dtype=torch.bool).tril(400)
    wanted = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.2, enable_gqa=True
    )
    torch.testing.assert_close(output, wanted)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("is_causal", [True, False])
def test_torch_accepts_the_operators(exact: bool, is_causal: bool) -> None:
    """Layouts too, on which compiled code relies: by the sparse way and by the exact one."""
    tensors = inputs(4, 2, 700, 700, 16, torch.float32, batch=1)
    plain = [each.detach() for each in tensors]
    choice = Choice(recall=0.5, window=WINDOW)
    scored = (*plain[:2], None, is_causal, 0.25)
    torch.library.opcheck(torch.ops.accel.omnisparse_select, (*scored, *choice.selecting()))
    keys, budget = random_selection(2, 700, is_causal, None, 1)
    if exact:
        budget.fill_(EXACT)
    where = (keys, budget, None, None, is_causal, 0.25, *choice.attending())
    torch.library.opcheck(torch.ops.accel.omnisparse_attend, (*tensors, *where))
    output, total, active = torch.ops.accel.omnisparse_attend(*plain, *where)
    torch.library.opcheck(
        torch.ops.accel.omnisparse_attend_backward,
        (torch.randn_like(output), *plain, output, total, keys, budget, active, None, is_causal,
         0.25, WINDOW),
    )  # fmt: skip


def test_one_graph_for_all_lengths() -> None:
    graphs = []

    def keep(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(module)
        return module.forward

    compiled = torch.compile(omnisparse_attention, backend=keep, fullgraph=True, dynamic=True)
    for length in (500, 700, 1100):
        tensors = inputs(4, 2, length, length, 16, torch.float32)
        got = compiled(*tensors, is_causal=True, recall=0.5)
        wanted = omnisparse_attention(*tensors, is_causal=True, recall=0.5)
        torch.testing.assert_close(got, wanted)
    assert len(graphs) == 1


def test_selections_can_be_observed() -> None:
    """Of plain and compiled calls, and only meanwhile."""
    tensors = inputs(4, 2, 1000, 1000, 16, torch.float32)
    compiled = torch.compile(omnisparse_attention, fullgraph=True)
    settings: dict[str, Any] = {"is_causal": True, "recall": 0.5}
    with accel.observe_selections() as outer:
        omnisparse_attention(*tensors, **settings)
        with accel.observe_selections() as inner:
            compiled(*tensors, **settings)
    compiled(*tensors, **settings)
    assert (len(outer), len(inner)) == (2, 1)
    wanted = select(*(each.detach() for each in tensors[:2]), None, True, 0.25, Choice(0.5))
    assert inner[0].budget.equal(wanted.budget)
    torch.testing.assert_close(outer[0].recall, wanted.recall)


def tensors_like(**changes: Any) -> list[Tensor]:
    shapes = {"query": (1, 4, 8, 16), "key": (1, 2, 8, 16), "value": (1, 2, 8, 16)} | changes
    return [torch.zeros(shape) for shape in shapes.values()]


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        (tensors_like(key=(1, 3, 8, 16), value=(1, 3, 8, 16)), {}, "multiple of the key heads"),
        (tensors_like(key=(1, 2, 9, 16)), {}, "equal ones for key and value"),
        (tensors_like(query=(2, 4, 8, 16)), {}, "batch and width have to be equal"),
        (tensors_like(query=(1, 4, 0, 16)), {}, "no size can be 0"),
        (tensors_like(query=(1, 4, 9, 16)), {"is_causal": True}, "as many keys as queries"),
        (tensors_like(), {"recall": 0.0}, "recall is 0.0"),
        (tensors_like(), {"recall": 1.1}, "recall is 1.1"),
        (tensors_like(), {"active": 2.0}, "active is 2.0"),
        (tensors_like(), {"lazy": "none"}, "lazy is 'none'"),
        (
            tensors_like(),
            {"valid": torch.ones(8, dtype=torch.bool)},
            r"needed is torch.bool \[1, 8\]",
        ),
        (tensors_like(), {"heads": -0.5}, "heads is -0.5"),
        (tensors_like(), {"window": -1}, "window is -1"),
        (tensors_like(), {"span": (5, 2)}, r"span is \(5, 2\)"),
        ([each.long() for each in tensors_like()], {}, "floating-point type"),
        ([each.to("meta") for each in tensors_like()], {}, "needed is one device, cpu or cuda"),
    ],
)
def test_what_is_refused(tensors: list[Tensor], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(accel.OptionError, match=message):
        omnisparse_attention(*tensors, **settings)


def test_mixed_types_are_refused() -> None:
    query, key, value = tensors_like()
    with pytest.raises(accel.OptionError, match="one floating-point type"):
        omnisparse_attention(query, key.half(), value)


def test_tensors_in_any_order_in_memory() -> None:
    query, key, value = (each.detach() for each in inputs(4, 2, 700, 700, 16, torch.float32))
    for one, other in ((1, 2), (2, 3)):
        turned = [
            each.transpose(one, other).contiguous().transpose(one, other).requires_grad_()
            for each in (query, key, value)
        ]
        for recall in (0.5, 1.0):
            settings: dict[str, Any] = {"is_causal": True, "recall": recall}
            got = omnisparse_attention(*turned, **settings)
            plain = [each.clone().requires_grad_() for each in (query, key, value)]
            wanted = omnisparse_attention(*plain, **settings)
            torch.testing.assert_close(got, wanted)
            gradient = torch.randn_like(wanted)
            gradients = torch.autograd.grad(wanted, plain, gradient)
            for mine, theirs in zip(
                torch.autograd.grad(got, turned, gradient), gradients, strict=True
            ):
                torch.testing.assert_close(mine, theirs)
