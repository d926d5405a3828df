"""`accel.omnisparse_attention`: the operators that a compiler sees, and what users call.

Two operators: `accel::omnisparse_select` decides what is looked at, `accel::omnisparse_attend`
looks there, forward and backward. All their results have shapes that the inputs' shapes give.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError
from . import cpu
from .selection import Choice, Selection, select

__all__ = ["omnisparse_attention"]


@torch.library.custom_op("accel::omnisparse_select", mutates_args=())
def _select(
    query: Tensor,
    key: Tensor,
    is_causal: bool,
    scale: float,
    recall: float,
    heads: float,
    window: int,
    sinks: int,
    start: int,
    stop: int,
    locality: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    choice = Choice(recall, heads, window, sinks, (start, stop), locality)
    return select(query, key, is_causal, scale, choice)


@_select.register_fake
def _(query: Tensor, key: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    batch, heads, queries, _ = query.shape
    groups, keys = key.shape[1:3]
    return (
        key.new_empty(batch, groups, keys, dtype=torch.int32),
        key.new_empty((), dtype=torch.int64),
        key.new_empty(batch, groups, queries, dtype=torch.bool),
        key.new_empty(batch, heads, dtype=torch.float32),
        key.new_empty(batch, heads, dtype=torch.int64),
    )


@torch.library.custom_op("accel::omnisparse_attend", mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    budget: Tensor,
    active: Tensor,
    is_causal: bool,
    scale: float,
    window: int,
    sinks: int,
) -> tuple[Tensor, Tensor]:
    selection = Selection(keys, budget, active, budget, budget)
    return cpu.forward(query, key, value, selection, is_causal, scale, window, sinks)


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    batch, heads, queries, width = query.shape
    output = query.new_empty(batch, queries, heads, width).transpose(1, 2)
    exact = torch.promote_types(query.dtype, torch.float32)
    return output, query.new_empty(batch, heads, queries, dtype=exact)


@torch.library.custom_op("accel::omnisparse_attend_backward", mutates_args=())
def _attend_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    total: Tensor,
    keys: Tensor,
    budget: Tensor,
    active: Tensor,
    is_causal: bool,
    scale: float,
    window: int,
    sinks: int,
) -> tuple[Tensor, Tensor, Tensor]:
    selection = Selection(keys, budget, active, budget, budget)
    where = is_causal, scale, window, sinks
    return cpu.backward(gradient, query, key, value, output, total, selection, *where)


@_attend_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (
        torch.empty_like(each, memory_format=torch.contiguous_format)
        for each in (query, key, value)
    )
    return query, key, value


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:6])
    ctx.settings = inputs[6:]


def _differentiate(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    query, key, value, output, total, *selection = ctx.saved_tensors
    gradients = torch.ops.accel.omnisparse_attend_backward(
        gradient, query, key, value, output, total, *selection, *ctx.settings
    )
    return *gradients, *[None] * 7


_attend.register_autograd(_differentiate, setup_context=_save)


def omnisparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    recall: float = 0.95,
    heads: float = 1.0,
    window: int = 128,
    sinks: int = 4,
    span: tuple[int, int] = (0, 0),
    locality: float = 0.95,
) -> Tensor:
    """Attention over the keys that matter, after the abstract of OmniSparse (arXiv 2511.12201).

    query: [batch, heads, queries, width]; key, value: [batch, key heads, keys, width], where the
    heads are a multiple of the key heads. With `is_causal`, the last query sees the last key (the
    bottom-right corner; for as many queries as keys, what torch does). scale: 1 / sqrt(width).

    recall: the share of each head's attention to keep, in (0, 1]; estimated by 128 probe queries.
    1 is exact attention, and so is what does not pay or can't be estimated (see `Selection`).
    heads: the quantile of the heads' budgets that all get; 1 is the flattest head's, as in the
    paper. window: keys around a query's tile of 128 that it always sees. sinks: first keys that
    every query sees. span: [start, stop) of the queries that may be lazy, such as those of a video;
    a lazy query sees no far key but the sinks. It is lazy if it pays these and its neighbourhood at
    least the share `locality` of its attention. Gradients flow through what was looked at.

    Returns [batch, heads, queries, width]. Raises OptionError for inputs or settings that do not
    fit, and on other devices than a CPU: there is no kernel for them yet.
    """
    choice = Choice(recall, heads, window, sinks, span, locality)
    _check(query, key, value, is_causal)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return attend_with_selection(query, key, value, is_causal, scale, choice)[0]


def attend_with_selection(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float, choice: Choice
) -> tuple[Tensor, Selection]:
    """As `omnisparse_attention`, unchecked; the result, and what was looked at."""
    chosen = torch.ops.accel.omnisparse_select(
        query.detach(), key.detach(), is_causal, scale, *choice.settings()
    )
    output, _ = torch.ops.accel.omnisparse_attend(
        query, key, value, *chosen[:3], is_causal, scale, choice.window, choice.sinks
    )
    return output, Selection(*chosen)


def _check(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> None:
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    if not query.dim() == key.dim() == value.dim() == 4 or key.shape != value.shape:
        raise OptionError(
            f"{shapes}: needed are [batch, heads, tokens, width], and equal ones for key and value"
        )
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise OptionError(f"{shapes}: batch and width have to be equal")
    if 0 in query.shape or 0 in key.shape:
        raise OptionError(f"{shapes}: no size can be 0")
    if query.shape[1] % key.shape[1]:
        raise OptionError(f"{shapes}: the heads have to be a multiple of the key heads")
    if is_causal and query.shape[2] > key.shape[2]:
        raise OptionError(f"{shapes}: causal attention needs at least as many keys as queries")
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        raise OptionError(
            f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}; needed is one "
            "floating-point type"
        )
    devices = {str(each.device) for each in (query, key, value)}
    if devices != {"cpu"}:
        raise OptionError(
            f"the tensors are on {', '.join(sorted(devices))}; so far this runs on a CPU only"
        )
