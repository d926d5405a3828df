"""What Inductor has to be told about graphs with branches. Imported late: Inductor loads slowly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from ..passes.graphs import hint

__all__ = ["inductor_settings"]


class _SettleOperands(CustomGraphPass):
    """Inductor hands a branch its operands in the layout that the branch was compiled for.

    torch 2.13 compiles a branch for the layouts that tracing saw, and may meanwhile choose another
    for a value that it hands in. JIT code then fails an assertion; ahead-of-time code computes with
    garbage. For calls of shared subgraphs torch itself does what this does.

    earlier: the pass that the user has set in this place; it runs first.
    """

    def __init__(self, earlier: Any) -> None:
        self.earlier = earlier

    def __call__(self, graph: fx.Graph) -> None:
        if self.earlier is not None:
            self.earlier(graph)
        for branch in graph.find_nodes(
            op="call_function", target=torch.ops.higher_order.cond, sort=False
        ):
            *_, operands = branch.args
            settled = [_in_order(graph, branch, operand) for operand in operands]
            branch.args = (*branch.args[:-1], tuple(settled))

    def uuid(self) -> Any:
        ours = "accel: settle operands of branches, 1"
        if self.earlier is None:
            return ours
        other = self.earlier.uuid() if isinstance(self.earlier, CustomGraphPass) else None
        return None if other is None else (ours, other)  # None: torch must not cache


def _in_order(graph: fx.Graph, branch: fx.Node, operand: Any) -> Any:
    value = operand.meta.get("val") if isinstance(operand, fx.Node) else None
    if not isinstance(value, Tensor) or operand.op == "placeholder":
        return operand
    # Inductor reads off the order only, and the strides may be symbols.
    order = [hint(stride) for stride in value.stride()]
    with graph.inserting_before(branch):
        settled = graph.call_function(
            torch.ops.prims.inductor_force_stride_order.default, (operand, order)
        )
    settled.meta = dict(operand.meta)
    return settled


def inductor_settings() -> dict[str, Any]:
    """Settings that Inductor needs for a graph with branches."""
    earlier = torch._inductor.config.post_grad_custom_post_pass
    return {"post_grad_custom_post_pass": _SettleOperands(earlier)}
