"""The callable for a graph with tables: computes them, and again when a weight has changed."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...passes import Constants
from .fingerprint import Fingerprint

__all__ = ["TableGraph", "drop_tables"]

_graphs: weakref.WeakSet[TableGraph] = weakref.WeakSet()


class _Computed(NamedTuple):
    """sources: the tensors; fingerprint: what they held when the tables were computed from them;
    came_with: the ids of all tensors of that call."""

    sources: tuple[weakref.ref[Tensor], ...]
    fingerprint: Fingerprint
    tables: tuple[Tensor, ...]
    came_with: frozenset[int]


class TableGraph:
    """Calls a graph that takes tables after the inputs that Dynamo knows of.

    Tables are kept for each model that runs through the graph, for as long as it lives, and until
    a weight is found to have changed: see `Fingerprint` and `accel.refresh`. Where a weight has no
    memory of its own (a tensor that wraps others), they are computed at every call.

    times: that tables were computed.
    """

    def __init__(self, function: Callable[..., Any], tables: Constants) -> None:
        self.function = function
        self.tables = tables
        self.computed: dict[tuple[int, ...], _Computed] = {}
        self.times = 0
        _graphs.add(self)
        _watch_optimizers()

    def __call__(self, *inputs: Any) -> Any:
        return self.function(*inputs, *self._of(inputs))

    def _of(self, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        sources = [inputs[index] for index in self.tables.sources]
        key = tuple(map(id, sources))
        kept = self.computed.get(key)
        if kept is not None:
            if not kept.fingerprint.changed(sources):
                return kept.tables
            # So that old and new tables are not there at a time.
            self.computed.pop(key, None)
            del kept
        # Taken first: what changes while the tables are computed is noticed at the next call.
        fingerprint = Fingerprint.of(sources)
        tables = self.tables.computed(inputs)
        self.times += 1
        if fingerprint is not None:
            # An id may pass on to another tensor once this one is gone.
            forget = functools.partial(_forget, weakref.ref(self), key)
            references = tuple(weakref.ref(each, forget) for each in sources)
            came_with = frozenset(id(each) for each in inputs if isinstance(each, Tensor))
            self.computed[key] = _Computed(references, fingerprint, tables, came_with)
        return tables

    def forget(self, is_meant: Callable[[_Computed], bool]) -> None:
        """Drop tables, to be computed again at the next call."""
        for key, each in self.computed.copy().items():
            if is_meant(each):
                self.computed.pop(key, None)


def _forget(graph: weakref.ref[TableGraph], key: tuple[int, ...], _: Any) -> None:
    own = graph()
    if own is not None:
        own.computed.pop(key, None)


def drop_tables(tensors: frozenset[int]) -> None:
    """Drop the tables of models that have one of these tensors, given by their ids."""
    for graph in list(_graphs):
        graph.forget(lambda each: not tensors.isdisjoint(each.came_with))


@functools.cache
def _watch_optimizers() -> None:
    """Torch does not count what fused optimizers write, but tells after each step.

    A compiled step calls `_after_step` too, uncompiled; torch itself leaves the graph in a step.
    """
    from torch.optim.optimizer import register_optimizer_step_post_hook

    disable: Any = torch.compiler.disable
    register_optimizer_step_post_hook(disable(_after_step))


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Drop the tables that were computed from memory that the optimizer writes to."""
    if not any(graph.computed for graph in list(_graphs)):
        return
    groups = optimizer.param_groups
    written = {_storage(each) for group in groups for each in group["params"]} - {0}

    def is_meant(each: _Computed) -> bool:
        sources = [source() for source in each.sources]
        return any(one is not None and _storage(one) in written for one in sources)

    for graph in list(_graphs):
        graph.forget(is_meant)


def _storage(tensor: Tensor) -> int:
    """The address of the memory that a tensor views; 0 where it has none of its own."""
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:
        return 0
