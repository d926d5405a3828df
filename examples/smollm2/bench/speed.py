"""How long sparse attention takes: layer by layer, over lengths, and in the whole model."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ....kernels.omnisparse.selection import Choice, SelectionSummary
from .attention import Attend, Noted, attention, dense, sparse

__all__ = ["Layer", "by_layer", "inputs_of", "over_lengths", "prefill"]


@dataclass(frozen=True)
class Layer:
    """One layer on its own queries and keys. selected: see `SelectionSummary`; pairs: `pairs`."""

    layer: int
    selected: SelectionSummary
    pairs: float
    dense_seconds: float
    sparse_seconds: float


@torch.no_grad()
def by_layer(model: Any, tokens: Tensor, choice: Choice, repeats: int) -> list[Layer]:
    """Every layer's attention, dense and sparse in turns; dense results go on."""
    found: list[Layer] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
        noted = Noted()
        both = dense, sparse(choice, noted)
        seconds = _in_turns([partial(each, query, key, value) for each in both], repeats)
        selected = SelectionSummary.of(*noted.selections[0][1:])
        found.append(Layer(layer, selected, noted.pairs[0], *seconds))
        return dense(query, key, value)

    with attention(model, attend):
        model.model(tokens[None], use_cache=False)
    return found


@torch.no_grad()
def inputs_of(model: Any, tokens: Tensor, layer: int, choice: Choice) -> tuple[Tensor, ...]:
    """A layer's query, key and value; the layers before it attend sparsely."""
    kept: list[tuple[Tensor, ...]] = []
    run = sparse(choice)

    def attend(query: Tensor, key: Tensor, value: Tensor, at: int) -> Tensor:
        if at == layer:
            kept.append((query, key, value))
            raise _ReachedError
        return run(query, key, value, at)

    with attention(model, attend), contextlib.suppress(_ReachedError):
        model.model(tokens[None], use_cache=False)
    return kept[0]


class _ReachedError(Exception):
    """The layers behind are not needed."""


@torch.no_grad()
def over_lengths(
    tensors: tuple[Tensor, ...], lengths: Sequence[int], choice: Choice, repeats: int
) -> list[tuple[float, ...]]:
    """Length, dense and sparse seconds, and the share of the pairs, on the first so many tokens."""
    rows: list[tuple[float, ...]] = []
    for length in lengths:
        query, key, value = (each[:, :, :length].contiguous() for each in tensors)
        noted = Noted()
        both: tuple[Attend, Attend] = dense, sparse(choice, noted)
        seconds = _in_turns([partial(each, query, key, value) for each in both], repeats)
        rows.append((length, *seconds, noted.pairs[0]))
    return rows


@torch.no_grad()
def prefill(
    model: Any, tokens: Tensor, settings: Sequence[dict[str, Any]], repeats: int
) -> list[float]:
    """Seconds of the whole model, but for the logits of all tokens but the last: plain Inductor
    first, then the accel backend with each of these settings of omnisparse, in turns."""
    model.set_attn_implementation("sdpa")

    def compiled(options: dict[str, Any] | None) -> Callable[[], Any]:
        given: Any = {} if options is None else {"backend": "accel", "options": options}
        call = torch.compile(model, fullgraph=True, dynamic=False, **given)
        return lambda: call(tokens[None], use_cache=False, logits_to_keep=1)

    options = [{"pade": False, "omnisparse": each} for each in settings]
    calls = [compiled(each) for each in (None, *options)]
    for call in calls:
        call()  # compiles
    return _in_turns(calls, repeats)


def _in_turns(calls: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Median seconds of each."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for own, call in zip(seconds, calls, strict=True):
            started = time.perf_counter()
            call()
            own.append(time.perf_counter() - started)
    return [statistics.median(own) for own in seconds]
