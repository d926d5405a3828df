"""What Inductor has to be told about graphs with branches. Imported late: Inductor loads slowly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.lowering import constrain_to_fake_tensor, register_lowering
from torch._inductor.virtualized import V

__all__ = ["inductor_settings"]

# Stands in Inductor's graphs only, between its passes and its code generation. (Its own operator
# for this, inductor_force_stride_order, ties free sizes to their first values.)
_library = torch.library.Library("accel", "FRAGMENT")
_library.define("settle(Tensor x) -> Tensor")


@torch.library.register_fake("accel::settle", lib=_library)
def _(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


@register_lowering(torch.ops.accel.settle.default, type_promotion_kind=None)
def _lower_settle(x: Any) -> Any:
    operand: Any = V.graph.current_node.args[0]
    x.realize()
    return constrain_to_fake_tensor(x, operand.meta["val"])


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
    with graph.inserting_before(branch):
        settled = graph.call_function(torch.ops.accel.settle.default, (operand,))
    settled.meta = dict(operand.meta)
    return settled


def inductor_settings() -> dict[str, Any]:
    """Settings that Inductor needs for a graph with branches."""
    earlier = torch._inductor.config.post_grad_custom_post_pass
    return {"post_grad_custom_post_pass": _SettleOperands(earlier)}
