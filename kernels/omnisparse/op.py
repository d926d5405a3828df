"""`accel.omnisparse_attention`: the operators that a compiler sees, and what users call.

Two operators: `accel::omnisparse_select` decides what is looked at, `accel::omnisparse_attend`
looks there, forward and backward. All their results have shapes that the inputs' shapes give.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..costs import COSTS
from ..devices import kernels_for
from ..errors import OptionError
from ..exports import EXPORT_BODIES
from . import cpu, reference
from .selection import Choice, Selection, segment_count, select

__all__ = ["DEVICES", "each_selection", "observe_selections", "omnisparse_attention"]

DEVICES = ("cpu", "cuda")  # torch calls AMD's GPUs so, too


class _Observers(threading.local):
    """Who is to see the selections of a thread."""

    def __init__(self) -> None:
        self.all: list[Callable[[Selection], None]] = []


_observers = _Observers()


@contextmanager
def each_selection(see: Callable[[Selection], None]) -> Iterator[None]:
    """Call `see` with each selection of this thread meanwhile; it must not keep the tensors."""
    _observers.all.append(see)
    try:
        yield
    finally:
        _observers.all.remove(see)


@contextmanager
def observe_selections() -> Iterator[list[Selection]]:
    """The `Selection` of every call of sparse attention in this thread meanwhile, in their order.

    For each call: the budget that the heads shared in each segment, the recall that each head
    reached, and the budget that it needed for itself. Also of compiled models, for the selection is
    Python; a replayed CUDA graph shows nothing.
    """
    observed: list[Selection] = []

    def see(selection: Selection) -> None:
        observed.append(Selection(*(each.clone() for each in selection)))

    with each_selection(see):
        yield observed


@torch.library.custom_op("accel::omnisparse_select", mutates_args=())
def _select(
    query: Tensor,
    key: Tensor,
    valid: Tensor | None,
    is_causal: bool,
    scale: float,
    recall: float,
    active: float,
    heads: float,
    window: int,
    sinks: int,
    lazy: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    choice = Choice(recall, active, heads, window, sinks, lazy)
    choose = select if query.device.type == "cpu" else _kernels(query).select
    selection = Selection(*choose(query, key, valid, is_causal, scale, choice))
    # While a CUDA graph is captured, nothing has been computed yet, and memory is its own.
    if not (query.is_cuda and torch.cuda.is_current_stream_capturing()):
        for see in _observers.all:
            see(selection)
    return selection


@_select.register_fake
def _(query: Tensor, key: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    heads = query.shape[1]
    batch, groups, keys = key.shape[:3]
    segments = segment_count(keys)
    return (
        key.new_empty(batch, groups, segments, keys, dtype=torch.int32),
        key.new_empty(batch, segments, dtype=torch.int32),
        key.new_empty(batch, heads, segments, dtype=torch.float32),
        key.new_empty(batch, heads, segments, dtype=torch.int32),
    )


def _kernels(query: Tensor) -> Any:
    """The module with `forward` and `backward` for a tensor's device."""
    return kernels_for(query, cpu, f"{__package__}.gpu", "sparse attention")


@torch.library.custom_op("accel::omnisparse_attend", mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    budget: Tensor,
    valid: Tensor | None,
    visual: Tensor | None,
    is_causal: bool,
    scale: float,
    active: float,
    window: int,
    start: int,
    stop: int,
    tail: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _kernels(query).forward(
        query, key, value, keys, budget, valid, visual, is_causal, scale, active, window, start,
        stop, tail,
    )  # fmt: skip


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    batch, heads, queries, _ = query.shape
    exact = torch.promote_types(query.dtype, torch.float32)
    return (
        query.new_empty(query.shape),
        query.new_empty(batch, heads, queries, dtype=exact),
        query.new_empty(batch, heads, queries, dtype=torch.bool),
    )


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
    valid: Tensor | None,
    is_causal: bool,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _kernels(query).backward(
        gradient, query, key, value, output, total, keys, budget, active, valid, is_causal, scale,
        window,
    )  # fmt: skip


@_attend_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (
        torch.empty_like(each, memory_format=torch.contiguous_format)
        for each in (query, key, value)
    )
    return query, key, value


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, keys, budget, valid, _, is_causal, scale, _, window, *_ = inputs
    result, total, active = output
    ctx.mark_non_differentiable(total, active)
    ctx.save_for_backward(query, key, value, result, total, keys, budget, active, valid)
    ctx.settings = is_causal, scale, window


def _differentiate(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.accel.omnisparse_attend_backward(
        gradient, *ctx.saved_tensors, *ctx.settings
    )
    return *gradients, *[None] * 11


_attend.register_autograd(_differentiate, setup_context=_save)


def _flops(query: Tensor, key: Tensor, value: Tensor, *settings: Any) -> Any:
    """As if no key were left out; which are is known at run time only."""
    batch, heads, queries, width = query.shape
    return 2 * batch * heads * queries * key.shape[2] * (width + value.shape[3])


COSTS[torch.ops.accel.omnisparse_attend.default] = _flops
EXPORT_BODIES |= {
    torch.ops.accel.omnisparse_select.default: reference.omnisparse_select,
    torch.ops.accel.omnisparse_attend.default: reference.omnisparse_attend,
}


def omnisparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    valid: Tensor | None = None,
    visual: Tensor | None = None,
    recall: float = 0.9,
    active: float = 0.1,
    heads: float = 1.0,
    window: int = 128,
    sinks: int = 4,
    lazy: str = "selected",
    span: tuple[int, int] | None = None,
    tail: int = 16,
) -> Tensor:
    """Attention over the keys that matter, after the abstract of OmniSparse (arXiv 2511.12201).

    query: [batch, heads, queries, width]; key, value: [batch, key heads, keys, width], where the
    heads are a multiple of the key heads. With `is_causal`, the last query sees the last key (the
    bottom-right corner; for as many queries as keys, what torch does). scale: 1 / sqrt(width).
    valid: bool [batch, keys]; the others are padding, which nobody sees. visual: bool [batch,
    queries], such as the tokens of a video: only these may be lazy; None: all.

    Every query is lazy or active. An active one sees all keys; a lazy one its neighbourhood, which
    is its segment of 256 and `window` keys around it, and the keys that were selected for it.

    recall: the share of each head's attention that lazy queries keep, in (0, 1]; estimated by 32
    probe queries of each segment. 1 is exact attention, and so is what does not pay or can't be
    estimated (see `select`). active: the share of the queries that are active: those that would
    miss most, by an estimate; of those that may be lazy. 1 is exact attention.
    heads: the quantile of the heads' budgets that all get; 1 is the flattest head's, as in the
    paper. sinks: first keys that every query sees. lazy: "selected" keys or "local" only.
    span: [start, stop) of the queries that may be lazy, such as those of a video; all others, and
    the last `tail`, are active. Gradients flow through what was looked at.

    Returns [batch, heads, queries, width]; 0 for a query that sees no key. Raises OptionError for
    inputs or settings that do not fit, and on other devices than CPUs and GPUs.
    """
    choice = Choice(recall, active, heads, window, sinks, lazy, span, tail)
    _check(query, key, value, valid, is_causal)
    _check_table("visual", visual, query)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return attend_with_selection(query, key, value, valid, visual, is_causal, scale, choice)[0]


def attend_with_selection(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Tensor | None,
    visual: Tensor | None,
    is_causal: bool,
    scale: float,
    choice: Choice,
) -> tuple[Tensor, Selection, Tensor]:
    """As `omnisparse_attention`, unchecked; the result, what was selected, and which queries were
    active (bool [B, H, N])."""
    selection = torch.ops.accel.omnisparse_select(
        query.detach(), key.detach(), valid, is_causal, scale, *choice.selecting()
    )
    output, _, active = torch.ops.accel.omnisparse_attend(
        query, key, value, *selection[:2], valid, visual, is_causal, scale, *choice.attending()
    )
    return output, Selection(*selection), active


def _check(
    query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, is_causal: bool
) -> None:
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
    devices = {each.device for each in (query, key, value)}
    if len(devices) > 1 or query.device.type not in DEVICES:
        raise OptionError(
            f"the tensors are on {', '.join(sorted(map(str, devices)))}; needed is one device, "
            f"{' or '.join(DEVICES)}"
        )
    if query.device.type != "cpu" and query.dtype == torch.float64:
        raise OptionError("on a GPU, query, key and value can't be torch.float64")
    _check_table("valid", valid, key)


def _check_table(name: str, table: Tensor | None, of: Tensor) -> None:
    """One truth for each token of `of`, [B, H, N, D]."""
    if table is None:
        return
    needed = [of.shape[0], of.shape[2]]
    if table.dtype != torch.bool or list(table.shape) != needed or table.device != of.device:
        raise OptionError(
            f"{name} is {table.dtype} {list(table.shape)} on {table.device}; needed is torch.bool "
            f"{needed} on {of.device}"
        )
