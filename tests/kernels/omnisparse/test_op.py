"""The operators against the float64 reference, as torch sees them, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import accel
import pytest
import torch
from accel.kernels.omnisparse import cpu, omnisparse_attention, reference
from accel.kernels.omnisparse.selection import Choice, Selection, select
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

WINDOW, SINKS = 16, 2


def inputs(
    heads: int, groups: int, queries: int, keys: int, width: int, dtype: torch.dtype, batch: int = 2
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries * 7 + width)
    shapes = [(batch, heads, queries, width), *[(batch, groups, keys, width)] * 2]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def random_selection(
    groups: int, queries: int, keys: int, share: float, batch: int = 2
) -> Selection:
    """Another set of keys in each head, the sinks among them, and a third of the queries lazy."""
    generator = torch.Generator().manual_seed(keys)
    order = torch.rand(batch, groups, keys, generator=generator)
    order[..., :SINKS] = -1
    count = max(int(share * keys), min(SINKS, keys))
    order = order.argsort(-1)
    chosen = torch.cat([order[..., :count].sort(-1).values, order[..., count:]], -1)
    active = torch.rand(batch, groups, queries, generator=generator) > 1 / 3
    nothing = torch.zeros(())
    return Selection(chosen.int(), torch.tensor(count), active, nothing, nothing)


def expected(
    tensors: list[Tensor], selection: Selection, is_causal: bool, gradient: Tensor
) -> list[Tensor]:
    """Result, log-sum-exp and gradients by the reference in float64."""
    query, key, value = (each.detach().double().requires_grad_() for each in tensors)
    allowed = reference.visible(selection, query.shape[2], is_causal, WINDOW, SINKS)
    scale = 1 / math.sqrt(query.shape[-1])
    output, total = reference.attend(query, key, value, allowed, scale)
    return [output, total, *torch.autograd.grad(output, [query, key, value], gradient.double())]


def relative(got: Tensor, wanted: Tensor) -> float:
    return float(
        (got.detach().double() - wanted.detach()).norm() / wanted.detach().norm().clamp(min=0.1)
    )


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    ("heads", "groups", "queries", "keys", "width"),
    [
        (1, 1, 1, 1, 32), (4, 2, 63, 63, 64), (8, 1, 65, 65, 32), (2, 2, 1000, 1000, 64),
        (6, 2, 300, 1000, 128), (2, 1, 1, 700, 256), (3, 3, 129, 513, 48),
    ],
)  # fmt: skip
def test_values_and_gradients(
    heads: int, groups: int, queries: int, keys: int, width: int, is_causal: bool
) -> None:
    tensors = inputs(heads, groups, queries, keys, width, torch.float32)
    selection = random_selection(groups, queries, keys, 0.3)
    gradient = torch.randn_like(tensors[0])
    where: tuple[Any, ...] = (is_causal, 1 / math.sqrt(width), WINDOW, SINKS)
    chosen = selection[:3]
    output, total = torch.ops.accel.omnisparse_attend(*tensors, *chosen, *where)
    got = [output, total, *torch.autograd.grad(output, tensors, gradient)]
    for one, other in zip(got, expected(tensors, selection, is_causal, gradient), strict=True):
        assert relative(one, other) < 1e-5


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_low_precision(dtype: torch.dtype, limit: float) -> None:
    """To the rounding of results (bfloat16: 2^-8); sums are in float32."""
    tensors = inputs(4, 2, 300, 300, 64, dtype)
    selection = random_selection(2, 300, 300, 0.3)
    gradient = torch.randn_like(tensors[0])
    output, total = torch.ops.accel.omnisparse_attend(
        *tensors, *selection[:3], True, 0.125, WINDOW, SINKS
    )
    assert (output.dtype, total.dtype) == (dtype, torch.float32)
    got = [output, total, *torch.autograd.grad(output, tensors, gradient)]
    for one, other in zip(got, expected(tensors, selection, True, gradient), strict=True):
        assert relative(one, other) < limit


@pytest.mark.parametrize("is_causal", [True, False])
def test_full_recall_is_dense_attention(is_causal: bool) -> None:
    tensors = inputs(4, 2, 600, 600, 32, torch.float32)
    got = omnisparse_attention(*tensors, is_causal=is_causal, recall=1.0, span=(0, 600))
    wanted = scaled_dot_product_attention(*tensors, is_causal=is_causal, enable_gqa=True)
    torch.testing.assert_close(got, wanted)
    gradient = torch.randn_like(got)
    gradients = torch.autograd.grad(got, tensors, gradient)
    for one, other in zip(gradients, torch.autograd.grad(wanted, tensors, gradient), strict=True):
        torch.testing.assert_close(one, other)


def test_every_key_selected_tile_by_tile() -> None:
    """What a budget that keeps everything computes by the sparse way."""
    query, key, value = (each.detach() for each in inputs(4, 2, 200, 600, 32, torch.float32))
    full = select(query, key, True, 0.2, Choice(recall=1.0))
    output, _ = cpu.forward(query, key, value, full, True, 0.2, WINDOW, SINKS)
    mask = torch.ones(200, 600, dtype=torch.bool).tril(400)
    wanted = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.2, enable_gqa=True
    )
    torch.testing.assert_close(output, wanted)


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("is_causal", [True, False])
def test_torch_accepts_the_operators(share: float, is_causal: bool) -> None:
    """Layouts too, on which compiled code relies: by the sparse way and by the exact one."""
    tensors = inputs(4, 2, 200, 200, 16, torch.float32, batch=1)
    torch.library.opcheck(
        torch.ops.accel.omnisparse_select,
        (*(each.detach() for each in tensors[:2]), is_causal, 0.25, 0.9, 1.0, 16, 2, 0, 100, 0.9),
    )
    selection = random_selection(2, 200, 200, share, batch=1)
    if share == 1:
        selection = selection._replace(active=torch.ones_like(selection.active))
    where = (is_causal, 0.25, WINDOW, SINKS)
    torch.library.opcheck(torch.ops.accel.omnisparse_attend, (*tensors, *selection[:3], *where))
    plain = [each.detach() for each in tensors]
    output, total = torch.ops.accel.omnisparse_attend(*plain, *selection[:3], *where)
    torch.library.opcheck(
        torch.ops.accel.omnisparse_attend_backward,
        (torch.randn_like(output), *plain, output, total, *selection[:3], *where),
    )


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
        (tensors_like(), {"locality": 2.0}, "locality is 2.0"),
        (tensors_like(), {"heads": -0.5}, "heads is -0.5"),
        (tensors_like(), {"window": -1}, "window is -1"),
        (tensors_like(), {"span": (5, 2)}, r"span is \(5, 2\)"),
        ([each.long() for each in tensors_like()], {}, "floating-point type"),
        ([each.to("meta") for each in tensors_like()], {}, "on a CPU only"),
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
    turned = [each.transpose(1, 2).contiguous().transpose(1, 2) for each in (query, key, value)]
    settings: dict[str, Any] = {"is_causal": True, "recall": 0.5}
    torch.testing.assert_close(
        omnisparse_attention(*turned, **settings),
        omnisparse_attention(query, key, value, **settings),
    )
