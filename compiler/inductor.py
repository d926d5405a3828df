"""What Inductor has to be told about subgraphs. Imported late: Inductor loads slowly."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor import ir
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.lowering import constrain_to_fake_tensor, register_lowering
from torch._inductor.virtualized import V

__all__ = ["inductor_settings", "short_call_settings"]

# These stand in Inductor's graphs only, between its passes and its code generation. (Its own
# operator for the first, inductor_force_stride_order, ties free sizes to their first values.)
_library = torch.library.Library("accel", "FRAGMENT")
_library.define("settle(Tensor x) -> Tensor")
_library.define("own(Tensor[] results) -> Tensor[]")


@torch.library.register_fake("accel::settle", lib=_library)
def _(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


@torch.library.register_fake("accel::own", lib=_library)
def _(results: Sequence[Tensor]) -> list[Tensor]:
    return [
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in results
    ]


@register_lowering(torch.ops.accel.settle.default, type_promotion_kind=None)
def _lower_settle(x: Any) -> Any:
    operand: Any = V.graph.current_node.args[0]
    x.realize()
    return constrain_to_fake_tensor(x, operand.meta["val"])


@register_lowering(torch.ops.accel.own.default, type_promotion_kind=None)
def _lower_own(results: Sequence[Any]) -> list[Any]:
    nodes: Any = V.graph.current_node.args[0]
    taken: set[str] = set()
    owned = []
    for node, result in zip(nodes, results, strict=True):
        realized = ir.ExternKernel.realize_input(result)
        if _is_whole(realized) and realized.get_name() not in taken:
            taken.add(realized.get_name())
            owned.append(result)
        else:
            copy = ir.ExternKernel.copy_input(realized)
            owned.append(constrain_to_fake_tensor(copy, node.meta["val"]))
    return owned


def _is_whole(value: Any) -> bool:
    """Whether a value fills a buffer that this graph allocates for it."""
    buffer = value
    while isinstance(buffer, (ir.TensorBox, ir.StorageBox, ir.BaseView)):
        buffer = buffer.data
    if isinstance(buffer, (ir.InputBuffer, ir.ConstantBuffer)):
        return False
    if not isinstance(buffer.layout, (ir.FixedLayout, ir.FlexibleLayout)):
        return False  # a part of a concatenation, or another buffer's memory
    same_size = V.graph.sizevars.statically_known_equals(value.get_numel(), buffer.get_numel())
    return same_size and value.get_layout().offset == 0


class _SettleSubgraphs(CustomGraphPass):
    """Mends two faults of Inductor (torch 2.13) where tensors enter and leave subgraphs.

    Operands of a branch: it is compiled for the layouts that tracing saw, and Inductor may
    meanwhile choose another for a value that it hands in. JIT code then fails an assertion;
    ahead-of-time code computes with garbage. For calls of shared subgraphs torch settles this.

    Results of a shared subgraph: one that is a slice is read from where it begins in the tensor
    that it was cut from, although its address says that already; and its memory is used again while
    the other slices are in use. So results get memory of their own.

    earlier: the pass that the user has set in this place; it runs first.
    """

    def __init__(self, earlier: Any) -> None:
        self.earlier = earlier

    def __call__(self, graph: fx.Graph) -> None:
        if self.earlier is not None:
            self.earlier(graph)
        for branch in _calls(graph, torch.ops.higher_order.cond):
            operands: Any = branch.args[-1]
            settled = [_in_order(graph, branch, operand) for operand in operands]
            branch.args = (*branch.args[:-1], tuple(settled))
        for call in _calls(graph, torch.ops.higher_order.invoke_subgraph):
            reference: Any = call.args[0]
            subgraph: Any = getattr(graph.owning_module, reference.target)
            if not _calls(subgraph.graph, torch.ops.accel.own.default):
                _own_results(subgraph)

    def uuid(self) -> Any:
        # Part of the key of what Inductor keeps on disk. It holds what our operators promise and
        # what our passes wrote, and would outlive a change of those: every file counts.
        ours = get_hash_for_files(_sources())
        if self.earlier is None:
            return ours
        other = self.earlier.uuid() if isinstance(self.earlier, CustomGraphPass) else None
        return None if other is None else (ours, other)  # None: torch must not cache


@functools.cache
def _sources() -> tuple[str, ...]:
    """The files of all operators, passes and of what hands them to Inductor."""
    root = Path(__file__).parent.parent
    folders = (root / "kernels", root / "passes", root / "compiler")
    return tuple(
        sorted(str(path) for folder in folders for kind in ("*.py", "*.cpp")
               for path in folder.rglob(kind))
    )  # fmt: skip


def _calls(graph: fx.Graph, target: Any) -> list[fx.Node]:
    return list(graph.find_nodes(op="call_function", target=target, sort=False))


def _in_order(graph: fx.Graph, branch: fx.Node, operand: Any) -> Any:
    value = operand.meta.get("val") if isinstance(operand, fx.Node) else None
    if not isinstance(value, Tensor) or operand.op == "placeholder":
        return operand
    with graph.inserting_before(branch):
        settled = graph.call_function(torch.ops.accel.settle.default, (operand,))
    settled.meta = dict(operand.meta)
    return settled


def _own_results(subgraph: fx.GraphModule) -> None:
    graph = subgraph.graph
    output = graph.output_node()
    results: Any = output.args[0]
    values = [node.meta.get("val") if isinstance(node, fx.Node) else None for node in results]
    places = [place for place, value in enumerate(values) if isinstance(value, Tensor)]
    owned = list(results)
    with graph.inserting_before(output):
        own = graph.call_function(torch.ops.accel.own.default, ([results[i] for i in places],))
        own.meta["val"] = [values[place] for place in places]
        for index, place in enumerate(places):
            owned[place] = graph.call_function(operator.getitem, (own, index))
            owned[place].meta = dict(results[place].meta)
    output.args = (tuple(owned),)
    subgraph.recompile()


def inductor_settings() -> dict[str, Any]:
    """Settings that Inductor needs for a graph with subgraphs."""
    earlier = torch._inductor.config.post_grad_custom_post_pass
    return {"post_grad_custom_post_pass": _SettleSubgraphs(earlier)}


def short_call_settings() -> dict[str, Any]:
    """Settings for such a graph.

    A product with one row is best compiled with what surrounds it (measured to a width of 2,048,
    above which Inductor leaves it alone). Loops of fewer elements than two chunks are done before
    threads have shared them out.
    """
    fusions = torch._inductor.config.post_grad_fusion_options
    return {
        "cpp_wrapper": True,
        "post_grad_fusion_options": {**fusions, "decompose_mm_pass": {}},
        "cpp.min_chunk_size": 4096,
    }
