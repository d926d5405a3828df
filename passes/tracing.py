"""Writing plain torch code into a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from .graphs import value_of

__all__ = ["inline"]


class _Recorder(TorchFunctionMode):
    """Runs torch calls on fake tensors and writes each one down as a node."""

    def __init__(self, graph: fx.Graph, nodes: dict[int, fx.Node]) -> None:
        super().__init__()
        self.graph = graph
        self.nodes = nodes
        self.alive: list[Any] = []  # ids are only unique among living tensors

    def _note(self, value: torch.Tensor, node: fx.Node) -> None:
        node.meta["example_value"] = value
        self.nodes[id(value)] = node
        self.alive.append(value)

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
        self._note(result, node)
        return result


def inline(
    graph: fx.Graph, function: Callable[..., Any], arguments: Sequence[fx.Node]
) -> list[fx.Node]:
    """Append the body of a plain torch function of tensors to a graph; its results as nodes.

    The function runs once on the arguments' fake values, so it may ask for dimensions; it must
    not branch on values. The new nodes carry fake values of their own.
    """
    values = [value_of(node) for node in arguments]
    # The same tensor may be given twice (a blank history); views keep the arguments apart.
    values = [value.view_as(value) for value in values]
    nodes = {id(value): node for value, node in zip(values, arguments, strict=True)}
    with values[0].fake_mode, _Recorder(graph, nodes) as recorder:
        results = function(*values)
        listed = list(results) if isinstance(results, (tuple, list)) else [results]
    return [recorder.nodes[id(value)] for value in listed]
