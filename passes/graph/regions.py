"""Regions of a graph: what crosses their border, whether they can be cut out, and how."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from .emit import emit
from .facts import Memory
from .nodes import descendants, is_module_reference, storage_of, value_of

__all__ = ["extract", "fix_floats", "gather", "live_ins", "live_outs", "operands_of",
           "replace_by_call", "settle", "unsafe_effect"]  # fmt: skip


def live_ins(region: Sequence[fx.Node]) -> list[fx.Node]:
    """Values that a region (in graph order) reads from outside, in order of first use."""
    inside = set(region)
    found: dict[fx.Node, None] = {}
    for node in region:
        for source in node.all_input_nodes:
            if source not in inside and not is_module_reference(source):
                found.setdefault(source)
    return list(found)


def operands_of(region: Sequence[fx.Node]) -> list[fx.Node]:
    """What a region needs to stand alone: its live-ins, and the symbols that its sizes are made of.

    Inductor reads a symbol off an operand of that size; where sizes are only products of symbols
    (tokens of an image of any height and width) it has to be handed the factors too.
    """
    found = live_ins(region)
    mentioned: set[Any] = set()
    for node in [*found, *region]:
        value = value_of(node)
        sizes = (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else (value,)
        for size in sizes:
            if isinstance(size, torch.SymInt):
                mentioned |= size.node.expr.free_symbols
    symbols = {_symbol(node): node for node in found}
    for node in region[0].graph.find_nodes(op="placeholder"):
        if _symbol(node) in mentioned and _symbol(node) not in symbols:
            symbols[_symbol(node)] = node
            found.append(node)
    return found


def _symbol(node: fx.Node) -> Any:
    value = value_of(node)
    return value.node.expr if isinstance(value, torch.SymInt) else None


def live_outs(region: Sequence[fx.Node]) -> list[fx.Node]:
    """Values of a region that are read outside, in graph order."""
    inside = set(region)
    return [node for node in region if any(user not in inside for user in node.users)]


class _Seen:
    """What nodes have read, written, drawn and acted on so far."""

    def __init__(self) -> None:
        self.read: set[int] = set()
        self.written: set[int] = set()
        self.draws = self.acts = False

    def add(self, node: fx.Node, memory: Memory) -> None:
        facts = memory.facts_of(node)
        self.read |= memory.read_by(node)
        self.written |= memory.written_by(node)
        self.draws = self.draws or facts.draws
        self.acts = self.acts or bool(facts.acts)

    def conflicts(self, node: fx.Node, memory: Memory) -> bool:
        """Whether it matters that `node` comes after these, not before."""
        facts, writes = memory.facts_of(node), memory.written_by(node)
        if not writes.isdisjoint(self.read | self.written):
            return True
        if not memory.read_by(node).isdisjoint(self.written):
            return True
        return (facts.draws and self.draws) or (bool(facts.acts) and self.acts)


def unsafe_effect(
    region: Sequence[fx.Node], graph: fx.Graph, memory: Memory | None = None
) -> fx.Node | None:
    """A node because of which a region can't be cut out, if there is one.

    Inside: what draws random numbers, acts on more than values, or writes to memory that the region
    did not make. Around it: what `gather` would bring into another order with a node that reads or
    writes the same memory.
    """
    memory = memory or Memory(graph)
    inside = set(region)
    given = {number for node in live_ins(region) for number in memory.of(node)}
    for node in region:
        facts = memory.facts_of(node)
        if facts.draws or facts.acts or memory.written_by(node) & given:
            return node
    return _reordered(region, graph, memory, inside)


def _reordered(
    region: Sequence[fx.Node], graph: fx.Graph, memory: Memory, inside: set[fx.Node]
) -> fx.Node | None:
    """A node that must not change places with another, but would: `gather` puts what stands between
    the region's nodes before them, or behind them if it depends on them."""
    dependent = descendants(region)
    first, last = region[0], region[-1]
    of_region, behind = _Seen(), _Seen()
    started = False
    for node in graph.nodes:
        started = started or node is first
        if not started:
            continue
        if node in inside:
            if behind.conflicts(node, memory):
                return node
            of_region.add(node, memory)
        elif node in dependent:
            behind.add(node, memory)
        elif of_region.conflicts(node, memory) or behind.conflicts(node, memory):
            return node
        if node is last:
            return None
    return None


def extract(
    owner: fx.GraphModule,
    region: Sequence[fx.Node],
    operands: Sequence[fx.Node],
    finish: Callable[[fx.Graph, dict[fx.Node, fx.Node]], Sequence[fx.Node]],
) -> fx.GraphModule:
    """A module that computes `region` from `operands`.

    `finish(graph, mapping)` may append nodes and returns the results. Tensors and submodules that
    the region refers to by name are shared with `owner`.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for operand in operands:
        mapping[operand] = graph.placeholder(operand.name)
        mapping[operand].meta["example_value"] = value_of(operand)
    for node in region:
        for source in node.all_input_nodes:
            if source not in mapping and is_module_reference(source):
                mapping[source] = graph.node_copy(source)
        mapping[node] = graph.node_copy(node, lambda old: mapping[old])
    results = finish(graph, mapping)
    graph.output(tuple(results))
    module = fx.GraphModule(owner, graph)
    graph.lint()
    return module


def gather(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    """Reorder `graph` so that a region stands together, after all that it reads.

    Nodes between its first and last member that depend on it move behind it.
    """
    inside = set(nodes)
    after: list[fx.Node] = []
    moved: set[fx.Node] = set()
    started = False
    for node in list(graph.nodes):
        if node is nodes[0]:
            started = True
        if node is nodes[-1]:
            break
        if started and node not in inside:
            depends = any(source in inside or source in moved for source in node.all_input_nodes)
            if depends:
                moved.add(node)
                after.append(node)
            else:
                nodes[0].prepend(node)
    anchor = nodes[-1]
    for node in after:
        anchor.append(node)
        anchor = node


def replace_by_call(
    graph: fx.Graph,
    region: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    call: Callable[[], fx.Node],
    values: Sequence[Any],
    like: Sequence[fx.Node] | None = None,
) -> list[fx.Node]:
    """Put one call in the place of a region that stands together; the results of it.

    call: makes the call, at the point of insertion. values: its results' fake values, a tuple.
    outputs: what of the region is read outside; the first results of the call, in this order, take
    their places. like: for each of these results, a value whose shape it is given (a call of a
    branch returns flat tensors).
    """
    with graph.inserting_before(region[0]):
        made = call()
        made.meta["example_value"] = tuple(values)
        results = [emit(graph, operator.getitem, made, index) for index in range(len(values))]
        if like is not None:
            shaped = zip(results, like, strict=False)
            results[: len(like)] = [emit(graph, torch.Tensor.view_as, *pair) for pair in shaped]
    inside = set(region)
    for old, new in zip(outputs, results, strict=False):
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in inside)
    for node in reversed(region):
        graph.erase_node(node)
    return results


def settle(
    graph: fx.Graph,
    region: Sequence[fx.Node],
    operands: Sequence[fx.Node],
    others: Sequence[fx.Node] = (),
) -> dict[fx.Node, fx.Node]:
    """Copy operands of a region into plain layout, in front of it; the copies by operand.

    One in plain layout stays the same tensor, unless it shares memory with one before it or with
    one of `others`.
    """
    settled = {}
    storages = {storage_of(value_of(node)) for node in others}
    for operand in operands:
        with graph.inserting_before(region[0]):
            copy = emit(graph, torch.Tensor.contiguous, operand)
            if storage_of(value_of(copy)) in storages:
                graph.erase_node(copy)
                copy = emit(graph, _clone, operand)
        settled[operand] = copy
        storages.add(storage_of(value_of(copy)))
        for node in region:
            node.replace_input_with(operand, copy)
    return settled


def _clone(value: torch.Tensor) -> torch.Tensor:
    """A copy in plain layout."""
    return value.clone(memory_format=torch.contiguous_format)


def fix_floats(graph: fx.Graph, nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Make numbers that Dynamo left free into constants, with a guard; the nodes that remain.

    With `dynamic=True` the attributes of a model (an epsilon, an attention scale) are such numbers.
    Plain graphs may compute with them, but a branch or a shared subgraph can't be traced with one.
    """
    remaining = []
    for node in nodes:
        value = value_of(node)
        if isinstance(value, torch.SymFloat):
            number = float(value)  # torch notes what this relied on
            for user in list(node.users):
                user.args = _with_number(user.args, node, number)
                user.kwargs = _with_number(user.kwargs, node, number)
            if node.op != "placeholder":
                graph.erase_node(node)
        else:
            remaining.append(node)
    return remaining


def _with_number(arguments: Any, node: fx.Node, number: float) -> Any:
    return fx.node.map_arg(arguments, lambda each: number if each is node else each)
