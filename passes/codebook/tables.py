"""Computing a table in pieces of rows, so that what is made on the way takes bounded memory.

A row depends on its own id and on what all rows have in common. So there are two graphs: one
computes the latter, once; the other some rows, from what the first returned:

    codes, norms = once(weights)
    table[start:stop] = rows(codes, norms, start, stop)
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from ..graph.nodes import ancestors, call_name, hint, storage_of, value_of
from .lookups import NORMALIZING, REDUCING, Rows, lookup_of

__all__ = ["TableModule", "Work"]


class TableModule(nn.Module):
    """From the tensors that tables are computed from to the tables, one after the other."""

    def __init__(self, tables: Iterable[nn.Module]) -> None:
        super().__init__()
        self.tables = nn.ModuleList(tables)

    def forward(self, *sources: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        return tuple(table(*sources) for table in self.tables)


class _Table(nn.Module):
    """One table: `count` rows, of which `step` are computed at a time; without `rows` it is what
    `once` returns."""

    def __init__(
        self,
        once: fx.GraphModule,
        rows: fx.GraphModule | None = None,
        count: int = 0,
        step: int = 0,
    ) -> None:
        super().__init__()
        self.once = once
        self.rows = rows
        self.count = count
        self.step = step

    def forward(self, *sources: Tensor) -> Tensor:
        shared: tuple[Tensor, ...] = self.once(*sources)
        if self.rows is None:
            return shared[0]
        piece: Tensor = self.rows(*shared, 0, min(self.step, self.count))
        if self.step >= self.count:
            return piece
        table = piece.new_empty((self.count, *piece.shape[1:]))
        table[: self.step] = piece
        for start in range(self.step, self.count, self.step):
            del piece  # before the next one is made
            stop = min(start + self.step, self.count)
            piece = self.rows(*shared, start, stop)
            table[start:stop] = piece
        return table


@dataclass(frozen=True)
class Work:
    """What a table is computed by.

    found: what the rows depend on; None for a node that depends on the model's tensors alone, which
    is a table as it is. rows: what is computed for each id, in order. shared: what that is computed
    with, or the node itself.
    """

    found: Rows | None
    rows: tuple[fx.Node, ...]
    shared: tuple[fx.Node, ...]

    @staticmethod
    def of(node: fx.Node, rows: dict[fx.Node, Rows]) -> Work:
        """rows: as `analysed` found them."""
        if node not in rows:
            return Work(None, (), (node,))
        inside: set[fx.Node] = set()
        shared: dict[fx.Node, None] = {}
        todo = [node]
        while todo:
            each = todo.pop()
            if each in inside:
                continue
            inside.add(each)
            lookup = lookup_of(each)
            for source in each.all_input_nodes if lookup is None else [lookup[1]]:
                if source in rows:
                    todo.append(source)
                else:
                    shared.setdefault(source)
        return Work(rows[node], tuple(each for each in node.graph.nodes if each in inside),
                    tuple(shared))  # fmt: skip

    @property
    def once(self) -> int:
        """Bytes of what is computed for all rows, by the fake values."""
        return _made(self._before(), _size)

    @property
    def each(self) -> int:
        """Bytes that each of the rows takes while it is computed, twice what all results on the way
        take, as an operation may need as much again for itself."""
        found = self.found
        if found is None:
            return 0
        views = {storage_of(value_of(each)) for each in self.rows if lookup_of(each) is not None}
        own = [each for each in self.rows if storage_of(value_of(each)) not in views]
        return 2 * _made(own, lambda each: found.bytes(each) // found.count)

    @property
    def least(self) -> int:
        """Bytes that it takes a row at a time."""
        return self.once + self.each

    @property
    def sources(self) -> set[fx.Node]:
        """The program's inputs that it reads."""
        return {each for each in self._before() if each.op == "placeholder"}

    def _before(self) -> list[fx.Node]:
        """What leads to `shared`, in order."""
        found = ancestors(self.shared)
        return [each for each in self.shared[0].graph.nodes if each in found]

    def module(self, owner: fx.GraphModule, sources: Sequence[fx.Node], most: int) -> nn.Module:
        """From the values of `sources` to the table, with at most `most` bytes of work beside it,
        if one row at a time needs no more."""
        once = fx.GraphModule(owner, self._graph_of_shared(sources))
        if self.found is None:
            return _Table(once)
        step = max((most - self.once) // max(self.each, 1), 1)
        return _Table(once, fx.GraphModule(owner, self._graph_of_rows()), self.found.count, step)

    def _graph_of_shared(self, sources: Sequence[fx.Node]) -> fx.Graph:
        graph = fx.Graph()
        copies = {node: graph.placeholder(node.name) for node in sources}
        for node in self._before():
            if node not in copies:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[node] for node in self.shared))
        return graph

    def _graph_of_rows(self) -> fx.Graph:
        graph = fx.Graph()
        # Names of their own, as any may be that of a value in the model's code.
        copies = {
            node: graph.placeholder(f"shared_{index}") for index, node in enumerate(self.shared)
        }
        some = slice(graph.placeholder("start"), graph.placeholder("stop"))
        for node in self.rows:
            lookup = lookup_of(node)
            if lookup is not None:
                table = copies[lookup[1]]
                copies[node] = graph.call_function(operator.getitem, (table, some))
            else:
                copies[node] = graph.node_copy(node, copies.__getitem__)
                _reduce_last(copies[node])
        graph.output(copies[self.rows[-1]])
        return graph


def _reduce_last(node: fx.Node) -> None:
    """Count the dimension from the end: here the ids have one, wherever they have more or none."""
    if call_name(node) not in REDUCING | NORMALIZING:
        return
    if "dim" in node.kwargs:
        node.kwargs = node.kwargs | {"dim": -1}
    else:
        node.args = (node.args[0], -1, *node.args[2:])


def _made(nodes: Iterable[fx.Node], size: Callable[[fx.Node], int]) -> int:
    """Bytes of what nodes compute, each memory once."""
    sizes: dict[int, int] = {}
    for node in nodes:
        if isinstance(value_of(node), Tensor):
            sizes.setdefault(storage_of(value_of(node)), size(node))
    return sum(sizes.values())


def _size(node: fx.Node) -> int:
    """Of a value, in bytes; 0 for a tensor of the model's, which is there anyway."""
    if node.op == "placeholder":
        return 0
    value: Any = value_of(node)
    return math.prod(hint(each) for each in value.shape) * int(value.element_size())
