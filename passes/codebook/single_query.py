"""Attention of a single query, as multiplications and sums that a compiler fuses.

A recommender reads one state of its last block, so that a single query is left (see `rows`). For
one user the call of an attention kernel takes longer than its work. Before:

    seen = scaled_dot_product_attention(query, key, value, mask)

After:

    scores = where(mask, (query * key).sum(-1)[..., None, :] * scale, -inf)
    seen = (softmax(scores).transpose(-1, -2) * value).sum(-2, keepdim=True)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import scaled_dot_product_attention

from ..graph.emit import emit
from ..graph.nodes import value_of

__all__ = ["open_single_queries"]

LARGEST = 2**16  # elements of the keys; attention kernels are for more


def open_single_queries(graph: fx.Graph) -> int:
    """Rewrite a graph's attention where one example has one query; how many there were."""
    opened = 0
    for node in graph.find_nodes(op="call_function", target=scaled_dot_product_attention):
        if node.kwargs or len(node.args) > 4 or not _is_single(*node.args[:3]):
            continue
        with graph.inserting_before(node):
            result = emit(graph, _attention, *node.args)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        opened += 1
    return opened


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
