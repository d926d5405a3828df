"""What compiles a rewritten graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ..kernels.errors import OptionError
from ..passes.codebook.single_query import open_single_queries
from ..passes.graph.nodes import value_of
from .extras import optional
from .partitions import Partition, partitioned

__all__ = ["LEFT_OUT", "check_lowering", "lower"]

# Passes whose result a lowering can't take, and why.
LEFT_OUT = {
    "tensorrt": {
        "omnisparse": "torch_tensorrt has no converter for its operators",
        "outline": "torch_tensorrt has no converter for calls of subgraphs",
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
    module: fx.GraphModule,
    given: Sequence[Any],
    lowering: str,
    training: bool = False,
    config: Mapping[str, Any] | None = None,
    folded: bool = False,
) -> Callable[..., Any]:
    """A callable for `module`, compiled by Inductor or TensorRT, or the module itself ("eager").

    given: the inputs that Dynamo handed over; those that passes added come after them.
    training: whether gradients flow through the graph; shared subgraphs then need AOTAutograd also
    where nothing is compiled. config: Inductor's own settings, as `torch.compile(mode=...)` implies
    them. folded: whether much of the work has gone into tables.
    """
    if lowering == "eager" and not training:
        return module
    if lowering == "tensorrt":
        return partitioned(module, _tensorrt_part)
    inputs = [*given, *_added(module, len(given))]
    if lowering == "eager":
        from torch._dynamo.backends.debugging import aot_eager

        differentiable: Any = aot_eager(module, inputs)
        return differentiable
    from torch._higher_order_ops.invoke_subgraph import NestedCompileRegionOptions
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    from .inductor import calls_are_short, inductor_settings, short_call_settings

    # torch 2.13 caches the first trace of a shared subgraph. Inside a branch that first trace is
    # an alias check without decompositions, which Inductor then can't lower; saying which
    # decompositions the subgraph wants makes every trace the right one.
    table = select_decomp_table()
    for name, child in module.named_modules():
        if name.rpartition(".")[2].startswith("accel_block_"):
            child.meta["nested_region_config"] = NestedCompileRegionOptions(decompositions=table)
    # It also reads the outer backward graph's list of inputs that may be overwritten as if it were
    # the shared subgraph's, and overwrites a gradient that is still needed.
    with torch._functorch.config.patch(donated_buffer=False):
        short = {}
        if folded and calls_are_short(module):
            short = short_call_settings()
            open_single_queries(module.graph)
            module.recompile()
        settings = {**inductor_settings(), **short, **(config or {})}
        compiled: Any = compile_fx(module, inputs, config_patches=settings)
    return compiled


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
