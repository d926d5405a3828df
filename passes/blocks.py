"""Finding a model's stacks of repeated blocks in its captured graph.

Only the graph is read: the module paths that Dynamo leaves on nodes, and the data flow. There is
no list of model names. A *stack* is a run of at least two modules of one class under one parent
(`layers.0`, `layers.1`, ...), each of which does a matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from .graph.facts import Memory
from .graph.nodes import module_path

__all__ = ["Block", "Stack", "find_stacks", "where_of"]


@dataclass(frozen=True)
class Block:
    """One module of a stack and its nodes, in graph order."""

    path: str
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Stack:
    """Repeated modules under one parent, in order of execution."""

    parent: str
    class_name: str
    blocks: tuple[Block, ...]


def _module_stack(node: fx.Node) -> list[tuple[str, str]]:
    entries = (node.meta.get("nn_module_stack") or {}).values()
    return [
        (module_path(path), kind if isinstance(kind, str) else kind.__name__)
        for path, kind in entries
    ]


def where_of(node: fx.Node) -> str:
    """The module that a node was called in, and the node's name."""
    stack = _module_stack(node)
    return f"{stack[-1][0]} ({node.name})" if stack and stack[-1][0] else node.name


def _members(node: fx.Node) -> Iterator[tuple[str, str, str]]:
    """The enclosing list members of a node, outermost first: (parent, path, class name)."""
    for path, kind in _module_stack(node):
        parent, _, last = path.rpartition(".")
        if last.isdigit() and parent:
            yield parent, path, kind.rpartition(".")[2]


def find_stacks(graph: fx.Graph, memory: Memory) -> list[Stack]:
    """The outermost stacks of a graph, in order of execution. memory: of the graph."""
    members: dict[tuple[str, str], dict[str, list[fx.Node]]] = {}
    for node in graph.nodes:
        for parent, path, kind in _members(node):
            members.setdefault((parent, kind), {}).setdefault(path, []).append(node)
    stacks = {
        key: blocks
        for key, blocks in members.items()
        if sum(any(memory.facts_of(n).flops for n in nodes) for nodes in blocks.values()) >= 2
    }
    found = []
    for (parent, kind), blocks in stacks.items():
        nested = any(parent.startswith(path + ".") for other in stacks.values() for path in other)
        if not nested:
            listed = tuple(Block(path, tuple(nodes)) for path, nodes in blocks.items())
            found.append(Stack(parent, kind, listed))
    order = {node: position for position, node in enumerate(graph.nodes)}
    return sorted(found, key=lambda stack: order[stack.blocks[-1].nodes[-1]])
