"""The callable for a graph with tables: computes them, and again when a weight has changed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..passes.codebook import Tables

__all__ = ["TableGraph"]


class _Computed(NamedTuple):
    """sources: the tensors; versions: what they held when the tables were computed from them."""

    sources: tuple[weakref.ref[Tensor], ...]
    versions: tuple[Any, ...]
    tables: tuple[Tensor, ...]


class TableGraph:
    """Calls a graph that takes tables after the inputs that Dynamo knows of.

    Tables are kept for each model that runs through the graph, for as long as it lives. A change of
    a weight in place, by an optimizer or `load_state_dict`, is noticed by the version that torch
    counts; one through `.data` is not, as torch does not count it. Tensors made in inference mode
    have no versions: their tables are computed at every call. What is computed for all ids at once
    on the way to a table takes memory, too, for a moment.
    """

    def __init__(self, function: Callable[..., Any], tables: Tables) -> None:
        self.function = function
        self.tables = tables
        self.computed: dict[tuple[int, ...], _Computed] = {}
        self.times = 0  # that tables were computed

    def __call__(self, *inputs: Any) -> Any:
        return self.function(*inputs, *self._of(inputs))

    def _of(self, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        sources = [inputs[index] for index in self.tables.inputs]
        key, versions = tuple(map(id, sources)), tuple(map(_version, sources))
        kept = self.computed.get(key)
        # An id may have passed on to another tensor since.
        if (
            kept is not None
            and None not in versions
            and versions == kept.versions
            and all(ref() is each for ref, each in zip(kept.sources, sources, strict=True))
        ):
            return kept.tables
        tables = self.tables.computed(inputs)
        self.times += 1
        living = {
            other: each
            for other, each in self.computed.items()
            if all(ref() is not None for ref in each.sources)
        }
        living[key] = _Computed(tuple(map(weakref.ref, sources)), versions, tables)
        self.computed = living
        return tables


def _version(tensor: Tensor) -> Any:
    try:
        return tensor._version, tensor.data_ptr()
    except RuntimeError:  # made in inference mode; asking every tensor whether it was takes longer
        return None
