"""What compiles a rewritten graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ...kernels.errors import OptionError
from ...passes import Feature, Program
from ...passes.codebook.single_query import are_short
from ...passes.graph.nodes import graph_modules, value_of
from ..extras import optional
from .partitions import Partition, partitioned

__all__ = ["CANNOT", "check_lowering", "lower"]

# What a lowering can't take, and why.
CANNOT: dict[str, dict[Feature, str]] = {
    "tensorrt": {
        Feature.OPERATORS: "torch_tensorrt has no converter for its operators",
        Feature.SHARED_SUBGRAPHS: "torch_tensorrt has no converter for calls of subgraphs",
    }
}


def check_lowering(lowering: str, training: bool) -> None:
    """Raise before anything is compiled if a lowering's package is missing or does not fit."""
    if lowering != "tensorrt":
        return
    if training:
        raise OptionError("lowering 'tensorrt' is for inference; call the model under no_grad")
    optional("torch_tensorrt", "tensorrt")


def lower(
    program: Program,
    given: Sequence[Any],
    lowering: str,
    config: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """A callable for a program's graph, by one of `LOWERINGS`.

    given: the inputs that Dynamo handed over; those that passes added come after them. config:
    Inductor's own settings, as `torch.compile(mode=...)` implies them.
    """
    return LOWERINGS[lowering](program, given, config)


def _by_tensorrt(program: Program, given: Sequence[Any], config: Any) -> Callable[..., Any]:
    return partitioned(program.module, _tensorrt_part)


def _eager(program: Program, given: Sequence[Any], config: Any) -> Callable[..., Any]:
    """The graph itself; shared subgraphs need AOTAutograd where gradients flow through them."""
    module = program.module
    if not program.training:
        return module
    from torch._dynamo.backends.debugging import aot_eager

    differentiable: Any = aot_eager(module, [*given, *_added(module, len(given))])
    return differentiable


def _by_inductor(program: Program, given: Sequence[Any], config: Any) -> Callable[..., Any]:
    from torch._higher_order_ops.invoke_subgraph import NestedCompileRegionOptions
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    from ..inductor import inductor_settings, short_call_settings

    module = program.module
    # torch 2.13 caches the first trace of a shared subgraph. Inside a branch that first trace is
    # an alias check without decompositions, which Inductor then can't lower; saying which
    # decompositions the subgraph wants makes every trace the right one.
    table = select_decomp_table()
    for part in graph_modules(module):
        for call in part.graph.find_nodes(
            op="call_function", target=torch.ops.higher_order.invoke_subgraph
        ):
            child: Any = getattr(part, call.args[0].target)
            child.meta["nested_region_config"] = NestedCompileRegionOptions(decompositions=table)
    short = Feature.SHORT_CALLS in program.features and are_short(module)
    # It also reads the outer backward graph's list of inputs that may be overwritten as if it were
    # the shared subgraph's, and overwrites a gradient that is still needed.
    with torch._functorch.config.patch(donated_buffer=False):
        settings = {
            **inductor_settings(),
            **(short_call_settings() if short else {}),
            **(config or {}),
        }
        inputs = [*given, *_added(module, len(given))]
        compiled: Any = compile_fx(module, inputs, config_patches=settings)
    return compiled


LOWERINGS: dict[str, Callable[[Program, Sequence[Any], Any], Callable[..., Any]]] = {
    "inductor": _by_inductor,
    "eager": _eager,
    "tensorrt": _by_tensorrt,
}


def _added(module: fx.GraphModule, given: int) -> list[Any]:
    """Fake inputs for the placeholders that passes added.

    Dynamo's own values for a graph belong to another fake mode than the one that it compiles with.
    """
    context = torch._guards.TracingContext.try_get()
    added = [value_of(node) for node in module.graph.find_nodes(op="placeholder")][given:]
    mode = context.fake_mode if context is not None else None
    if mode is None:
        return added
    with mode:
        return [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in added
        ]


def _tensorrt_part(part: Partition) -> Callable[..., Any]:
    """As `torch.compile(backend="torch_tensorrt")` compiles a graph."""
    compile_graph: Any = torch._dynamo.lookup_backend("torch_tensorrt")
    compiled: Callable[..., Any] = compile_graph(part.module, part.examples())
    return compiled
