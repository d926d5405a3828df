"""Attention of a single query, as multiplications and sums that a compiler fuses.

A recommender reads one state of its last block, so that a single query is left (see `rows`). For
one user the call of an attention kernel takes longer than its work. Before:

    seen = scaled_dot_product_attention(query, key, value, mask)

After:

    scores = where(mask, (query * key).sum(-1)[..., None, :] * scale, -inf)
    seen = (softmax(scores).transpose(-1, -2) * value).sum(-2, keepdim=True)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.nn.functional import scaled_dot_product_attention

from ..base import Feature, Pass, PassResult, Program, Reason, Skip
from ..graph.emit import emit
from ..graph.nodes import copy_module, graph_modules, value_of

__all__ = ["SingleQueryPass", "are_short", "open_single_queries"]

LARGEST = 2**16  # elements of the keys; attention kernels are for more


@dataclass(frozen=True)
class SingleQueryPass(Pass):
    """Rewrite attention of one example with one query."""

    name: ClassVar[str] = "single_query"
    summary: ClassVar[str] = "attention of a single query becomes sums that a compiler fuses"
    applies: ClassVar[str] = "CPU graphs that the codebook pass has left little to do in"
    default: ClassVar[bool] = True

    def run(self, program: Program) -> tuple[Program, PassResult]:
        """Declines where calls are not short: attention kernels are for more work than that."""
        declined = _declined(program)
        if declined is not None:
            return program, PassResult(self.name, skipped=(declined,))
        module, _ = copy_module(program.module)
        opened = open_single_queries(module.graph)
        if not opened:
            detail = "none of one example and one query, in float32 and of known sizes"
            skip = Skip(Reason.NO_ATTENTION, detail)
            return program, PassResult(self.name, skipped=(skip,))
        module.recompile()
        return dataclasses.replace(program, module=module), PassResult(self.name, tuple(opened))


def open_single_queries(graph: fx.Graph) -> list[str]:
    """Rewrite a graph's attention where one example has one query; the names of what it was."""
    opened = []
    for node in graph.find_nodes(op="call_function", target=scaled_dot_product_attention):
        if node.kwargs or len(node.args) > 4 or not _is_single(*node.args[:3]):
            continue
        with graph.inserting_before(node):
            result = emit(graph, _attention, *node.args, like=node)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        opened.append(node.name)
    return opened


def _declined(program: Program) -> Skip | None:
    if Feature.SHORT_CALLS not in program.features:
        return Skip(Reason.NO_TABLES, "its calls are not short: nothing was folded into tables")
    if not are_short(program.module):
        return Skip(Reason.DEVICE, "it is not on the CPU alone, or calls shared subgraphs")
    return None


def are_short(module: fx.GraphModule) -> bool:
    """Whether a graph, most of whose work is done before it is called, is best called from C++.

    What is left is many small operations, and on a CPU it is their calls that take time. Inductor's
    C++ can't call subgraphs (torch 2.13).
    """
    values = [value_of(node) for node in module.graph.nodes]
    elsewhere = any(isinstance(each, Tensor) and each.device.type != "cpu" for each in values)
    return not elsewhere and len(list(graph_modules(module))) == 1


def _is_single(*operands: Any) -> bool:
    """Whether query, key and value, [1, heads, length, size], are of known sizes, the query's
    length 1. In half precision kernels compute in float32, so that is left to them."""
    query, key, value = map(value_of, operands)
    sizes = (*query.shape, *key.shape, *value.shape)
    if query.dtype is not torch.float32 or not all(isinstance(each, int) for each in sizes):
        return False
    one = all(each == 1 for each in (*query.shape[:-3], query.shape[-2]))
    return one and max(key.numel(), value.numel()) <= LARGEST


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = (query * key).sum(-1)[..., None, :] * query.shape[-1] ** -0.5
    if mask is not None:
        boolean = mask.dtype is torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if boolean else scores + mask
    # Where nothing is seen, attention is 0 in torch, not NaN.
    weights = torch.ops.aten._safe_softmax(scores, -1)
    return (weights.transpose(-1, -2) * value).sum(-2, keepdim=True)
