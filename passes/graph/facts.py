"""What a call does beyond computing its result: what it writes, shares, draws, and what it costs;
and which memory the values of a graph share, through views and the subgraphs that it calls.

Of one call it is seen by running it (`observed.py`), of a call of subgraphs it is what these do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator

from .nodes import storage_of, value_of
from .observed import (
    FORMULAS,
    Facts,
    attribute_of,
    leaves,
    observed,
    operands_of,
    tensors_in,
    unknown,
    value_in,
)

__all__ = ["Facts", "Memory", "changed_in_place", "facts_of", "flops", "is_impure", "is_pure",
           "remove_dead_code"]  # fmt: skip

_NOTHING = Facts()
Subgraphs = dict[fx.GraphModule, "_Summary"]


def facts_of(node: fx.Node, subgraphs: Subgraphs | None = None) -> Facts:
    """The facts of a node; of a call the first time by running it on fake values.

    subgraphs: what is known of those that the graph calls, which is added to. They must not change
    as long as it is used.
    """
    if node.op in ("placeholder", "get_attr", "output"):
        return _NOTHING
    if node.op not in ("call_function", "call_method"):
        return unknown(f"it calls {node.target}, which is no function")
    if isinstance(node.target, HigherOrderOperator):
        return _of_subgraphs(node, {} if subgraphs is None else subgraphs)
    return observed(node)


def is_pure(node: fx.Node) -> bool:
    """Whether a node only computes its result (it writes nothing, draws nothing, has no effect)."""
    return facts_of(node).pure


def is_impure(node: fx.Node) -> bool:
    """Whether a node counts even where nobody reads its result."""
    return node.op in ("placeholder", "output") or not is_pure(node)


def flops(node: fx.Node) -> int:
    """See `Facts.flops`."""
    return facts_of(node).flops


def remove_dead_code(graph: fx.Graph) -> None:
    """Erase what nobody reads, but for what writes, draws or acts."""
    graph.eliminate_dead_code(is_impure)


# Memory


class Memory:
    """Which values of a graph may share memory, and which calls write to it.

    Memory has numbers. Values share memory where their fakes have one storage, or where the call
    that made one shares memory with its operands. It describes the graph as it was when this was
    made; to ask for a node added since then is a KeyError.
    """

    def __init__(self, graph: fx.Graph, subgraphs: Subgraphs | None = None) -> None:
        self.graph = graph
        self.subgraphs: Subgraphs = {} if subgraphs is None else subgraphs
        self._facts: dict[fx.Node, Facts] = {}
        self._parent: dict[int, int] = {}
        self._own: dict[fx.Node, tuple[int, ...]] = {}
        written: dict[fx.Node, tuple[int, ...]] = {}
        for node in graph.nodes:
            found = self._numbers_of(node)
            self._own[node] = found
            facts = self._facts[node] = facts_of(node, self.subgraphs)
            if node.op not in ("call_function", "call_method"):
                continue
            if not (found or facts.opaque or facts.writes):
                continue
            operands = list(map(self._number, leaves(node)))
            # Where a call was not understood, its result may share memory with all it was given.
            pairs: Iterable[tuple[int, int]] = facts.shares
            if facts.opaque or len(found) != facts.results:
                pairs = ((mine, given) for mine in range(len(found)) for given in
                         range(len(operands)))  # fmt: skip
            for mine, given in pairs:
                self._unite(found[mine], operands[given])
            if facts.opaque:
                written[node] = tuple(operands)
            elif facts.writes:
                written[node] = tuple(operands[index] for index in facts.writes)
        self._written = {
            node: frozenset(map(self._root, numbers)) for node, numbers in written.items()
        }

    def facts_of(self, node: fx.Node) -> Facts:
        """The facts of a node, as it was when this was made."""
        return self._facts[node]

    def of(self, node: fx.Node) -> frozenset[int]:
        """The memory of a node's value."""
        return frozenset(map(self._root, self._own[node]))

    def stands_for(self, new: fx.Node, old: fx.Node) -> None:
        """Say that a node that is in the graph by now has taken another's place."""
        self._own[new] = self._own[old]

    def read_by(self, node: fx.Node) -> frozenset[int]:
        """The memory of all that a node reads."""
        return frozenset(number for each in node.all_input_nodes for number in self.of(each))

    def written_by(self, node: fx.Node) -> frozenset[int]:
        """The memory that a node may write to."""
        return self._written.get(node, frozenset())

    @property
    def writers(self) -> Iterator[fx.Node]:
        """The nodes that may write to memory, in the graph's order."""
        return iter(self._written)

    def _numbers_of(self, node: fx.Node) -> tuple[int, ...]:
        value = value_in(node)
        if node.op == "get_attr" and isinstance(value, Tensor):
            # Two nodes may name one tensor, each with a fake of its own.
            numbers = (self._number(value),)
            attribute = attribute_of(node)
            if attribute is not None:
                self._unite(numbers[0], self._number(attribute))
            return numbers
        if value is None and node.op in ("call_function", "call_method") and node.users:
            # Nothing is known of it: it may be memory of its own, or that of its operands.
            mine = -len(self._parent) - 1
            self._parent[mine] = mine
            for number in (n for each in node.all_input_nodes for n in self._own.get(each, ())):
                self._unite(mine, number)
            return (mine,)
        return tuple(map(self._number, tensors_in(value)))

    def _number(self, tensor: Tensor) -> int:
        try:
            number = storage_of(tensor)
        except (NotImplementedError, RuntimeError):  # a subclass without a storage of its own
            number = -id(tensor)
        self._parent.setdefault(number, number)
        return number

    def _root(self, number: int) -> int:
        while self._parent[number] != number:
            self._parent[number] = self._parent[self._parent[number]]
            number = self._parent[number]
        return number

    def _unite(self, left: int, right: int) -> None:
        self._parent[self._root(left)] = self._root(right)


def changed_in_place(
    nodes: Iterable[fx.Node], graph: fx.Graph, memory: Memory | None = None
) -> fx.Node | None:
    """A node that may write to the memory of one of `nodes`, if there is one."""
    memory = memory or Memory(graph)
    theirs = frozenset(number for node in nodes for number in memory.of(node))
    return next((node for node in memory.writers if memory.written_by(node) & theirs), None)


# Calls of subgraphs


@dataclass(frozen=True)
class _Summary:
    """Of a subgraph: whether it writes to what it is given, whether its results may share memory
    with that, and its facts otherwise."""

    writes: bool
    shares: bool
    draws: bool
    acts: str
    flops: int
    opaque: bool


def _summary(graph: fx.Graph, subgraphs: Subgraphs) -> _Summary:
    memory = Memory(graph, subgraphs)
    given = frozenset(
        number for each in graph.nodes if each.op in ("placeholder", "get_attr")
        for number in memory.of(each)
    )  # fmt: skip
    facts = [memory.facts_of(each) for each in graph.nodes]
    return _Summary(
        writes=any(memory.written_by(each) & given for each in memory.writers),
        shares=any(memory.of(each) & given for each in graph.output_node().all_input_nodes),
        draws=any(each.draws for each in facts),
        acts=next((each.acts for each in facts if each.acts), ""),
        flops=sum(each.flops for each in facts),
        opaque=any(each.opaque for each in facts),
    )


def _of_subgraphs(node: fx.Node, subgraphs: Subgraphs) -> Facts:
    """Of a higher-order operator: what its subgraphs do. It writes all that it reads where any of
    them writes to what it was given."""
    owner: Any = node.graph.owning_module
    named = [each for each in node.all_input_nodes if each.op == "get_attr"]
    children = [getattr(owner, str(each.target), None) for each in named]
    modules = [child for child in children if isinstance(child, fx.GraphModule)]
    if not modules:
        return unknown(f"{node.target} is no call of subgraphs")
    for module in modules:
        if module not in subgraphs:
            subgraphs[module] = _summary(module.graph, subgraphs)
    found = [subgraphs[module] for module in modules]
    operands, results = len(leaves(node)), len(tensors_in(value_of(node)))
    own = 0
    if node.target in FORMULAS:
        args, kwargs = operands_of(node)
        own = FORMULAS[node.target](*args, **kwargs, out_val=value_of(node))
    costs = [each.flops for each in found]
    branches = node.target is torch.ops.higher_order.cond
    shared = any(each.shares for each in found)
    return Facts(
        writes=frozenset(range(operands)) if any(each.writes for each in found) else frozenset(),
        shares=tuple((i, j) for i in range(results) for j in range(operands)) if shared else (),
        results=results,
        draws=any(each.draws for each in found),
        acts=next((each.acts for each in found if each.acts), ""),
        flops=own + (max(costs) if branches else sum(costs)),
        opaque=any(each.opaque for each in found),
    )
