"""A rewritten graph in parts, for a compiler that can't take `cond`: the choice stays in torch.

before --> computed or predicted --> after
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...passes.graph.nodes import copy_module, value_of
from ...passes.graph.regions import extract, live_outs, operands_of, replace_by_call

__all__ = ["Partition", "partitioned", "partitions"]


@dataclass(frozen=True)
class Partition:
    """A part and its place: "before", "computed", "predicted", "after", or "whole"."""

    name: str
    module: fx.GraphModule

    def __str__(self) -> str:
        calls = sum(node.op.startswith("call") for node in self.module.graph.nodes)
        return f"{self.name} ({calls} calls)"

    def examples(self) -> list[Any]:
        """A fake value for each input."""
        return [value_of(node) for node in self.module.graph.find_nodes(op="placeholder")]


Compile = Callable[[Partition], Callable[..., Any]]


class _Part(nn.Module):
    """A compiled part, for a graph to call."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)


class _Choice(nn.Module):
    """What is left of `cond`."""

    def __init__(self, computed: Callable[..., Any], predicted: Callable[..., Any]) -> None:
        super().__init__()
        self.computed = computed
        self.predicted = predicted

    def forward(self, compute: Tensor, *operands: Any) -> Any:
        return self.computed(*operands) if compute else self.predicted(*operands)


def partitions(module: fx.GraphModule) -> list[Partition]:
    """The parts of a rewritten graph, in order."""
    found: list[Partition] = []

    def collect(part: Partition) -> Callable[..., Any]:
        found.append(part)
        return part.module.forward

    partitioned(module, collect)
    return found


def partitioned(module: fx.GraphModule, compile_part: Compile) -> Callable[..., Any]:
    """A callable like `module`, made of parts that `compile_part` has compiled."""
    module, _ = copy_module(module)
    graph = module.graph
    branch = next((node for node in graph.nodes if _is_skip_branch(node)), None)
    if branch is None:
        return compile_part(Partition("whole", module))
    calls = [node for node in graph.nodes if node.op in ("call_function", "call_method")]
    place = calls.index(branch)
    _replace(module, "before", calls[:place], compile_part)

    compute, *references, operands = branch.args
    ways = []
    for name, reference in zip(("computed", "predicted"), references, strict=True):
        ways.append(compile_part(Partition(name, getattr(module, reference.target))))
    module.add_submodule("accel_choice", _Choice(*ways))
    with graph.inserting_before(branch):
        choice = graph.call_module("accel_choice", (compute, *operands))
    # Taking the results apart belongs to the choice.
    after = [node for node in calls[place + 1 :] if branch not in node.all_input_nodes]
    branch.replace_all_uses_with(choice)
    for node in (branch, *references):
        graph.erase_node(node)

    _replace(module, "after", after, compile_part)
    module.recompile()
    whole: Callable[..., Any] = module.forward
    return whole


def _is_skip_branch(node: fx.Node) -> bool:
    if node.target is not torch.ops.higher_order.cond:
        return False
    return str(node.args[1]).startswith("accel_blocks")


def _replace(
    module: fx.GraphModule, name: str, nodes: Sequence[fx.Node], compile_part: Compile
) -> None:
    """Put one call of a compiled part in the place of `nodes` (in graph order)."""
    if not nodes:
        return
    graph, outputs, operands = module.graph, live_outs(nodes), operands_of(nodes)
    body = extract(module, nodes, operands, lambda _, mapping: [mapping[n] for n in outputs])
    module.add_submodule(f"accel_{name}", _Part(compile_part(Partition(name, body))))
    call = partial(graph.call_module, f"accel_{name}", tuple(operands))
    replace_by_call(graph, nodes, outputs, call, [value_of(output) for output in outputs])
