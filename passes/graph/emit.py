"""Adding to a graph: the one way in which passes make nodes. Each node gets its fake value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from .nodes import fake_mode, value_of

__all__ = ["Slot", "add_input", "emit", "inline"]

# Where a node comes from, which a node that takes another's place inherits.
_ORIGIN = ("nn_module_stack", "stack_trace", "source_fn_stack")


def emit(graph: fx.Graph, function: Any, *args: Any, like: fx.Node | None = None) -> fx.Node:
    """A new node at the point of insertion: `function(*args)`, with the value that it gives for the
    operands' fake values.

    function: what torch can trace: a function, an operator, a method by `torch.Tensor.name`.
    like: the node whose place it takes; the new one is said to come from the same module and line.
    """
    node = graph.call_function(function, args)
    values = fx.node.map_arg(args, value_of)
    with fake_mode(graph):
        node.meta["example_value"] = function(*values)
    if like is not None:
        node.meta |= {name: like.meta[name] for name in _ORIGIN if name in like.meta}
    return node


@dataclass(frozen=True)
class Slot:
    """A tensor that a pass adds to a graph's inputs or results; a size may be symbolic."""

    name: str
    shape: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device


def add_input(module: fx.GraphModule, slot: Slot) -> fx.Node:
    """A new last input, in plain layout."""
    graph = module.graph
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        node = graph.placeholder(slot.name)
    with fake_mode(graph):
        node.meta["example_value"] = torch.empty(slot.shape, dtype=slot.dtype, device=slot.device)
    return node


class _Recorder(TorchFunctionMode):
    """Runs torch calls on fake tensors and writes each one down as a node."""

    def __init__(self, graph: fx.Graph, nodes: dict[int, fx.Node]) -> None:
        super().__init__()
        self.graph = graph
        self.nodes = nodes
        self.alive: list[Any] = []  # ids are only unique among living tensors

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, torch.Tensor) or id(result) in self.nodes:
            return result  # sizes and the like are constants; the same tensor needs no node

        def known(value: Any) -> Any:
            return self.nodes[id(value)] if isinstance(value, torch.Tensor) else value

        arguments = tree_map(known, args), tree_map(known, kwargs or {})
        name = getattr(func, "__name__", "")
        if getattr(torch.Tensor, name, None) is func:
            node = self.graph.call_method(name, *arguments)
        else:
            node = self.graph.call_function(func, *arguments)
        node.meta["example_value"] = result
        self.nodes[id(result)] = node
        self.alive.append(result)
        return result


def inline(
    graph: fx.Graph, function: Callable[..., Any], arguments: Sequence[fx.Node]
) -> list[fx.Node]:
    """Write the body of a plain torch function of tensors into a graph; its results as nodes.

    The function runs once on the arguments' fake values, so it may ask for dimensions; it must
    not branch on values. Where `emit` makes one node of a function, this makes one of each call in
    it: for what a branch has to show to tracing and verification.
    """
    values = [value_of(node) for node in arguments]
    # The same tensor may be given twice (a blank history); views keep the arguments apart.
    values = [value.view_as(value) for value in values]
    nodes = {id(value): node for value, node in zip(values, arguments, strict=True)}
    with values[0].fake_mode, _Recorder(graph, nodes) as recorder:
        results = function(*values)
        listed = list(results) if isinstance(results, (tuple, list)) else [results]
    return [recorder.nodes[id(value)] for value in listed]
