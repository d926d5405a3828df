"""Attention in a captured graph: which nodes it is, however it is written.

Found are calls of `scaled_dot_product_attention`, torch's function or the ATen operator, and the
same written out: softmax(query key^T * scale + mask) value, as in transformers' eager attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import scaled_dot_product_attention

from ..graph.facts import Memory, changed_in_place
from ..graph.nodes import call_name, value_of

__all__ = ["Attention", "find_attention", "without_copies"]

DEFAULTS = {
    "attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False,
}  # fmt: skip
ORDER = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
CALLS = (scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)
PRODUCTS = ("matmul", "bmm", "__matmul__")


@dataclass(frozen=True)
class Attention:
    """One attention.

    node: what computes the result. arguments: those of `scaled_dot_product_attention`, by name.
    inner: what only `node` needs, the last first; where it is written out.
    obstacle: why it can't be replaced, where the graph shows that.
    """

    node: fx.Node
    arguments: dict[str, Any]
    inner: tuple[fx.Node, ...] = ()
    obstacle: str = ""


def find_attention(graph: fx.Graph, memory: Memory) -> Iterator[Attention]:
    """All of a graph's, in its order. Safe to use while they are replaced. memory: of the graph."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in CALLS:
            given = dict(zip(ORDER, node.args, strict=False))
            yield Attention(node, {**DEFAULTS, **given, **node.kwargs})
        elif node.op.startswith("call") and call_name(node) in PRODUCTS:
            found = _written_out(node, memory)
            if found is not None:
                yield found


def _written_out(node: fx.Node, memory: Memory) -> Attention | None:
    """Attention whose last step is this product of weights and values."""
    weights, value = _operands(node)
    if weights is None or value is None:
        return None
    inner = []
    dropped = 0.0
    while call_name(weights) in ("dropout", "to", "type_as"):
        inner.append(weights)
        if call_name(weights) == "dropout":
            dropped = _dropout(weights)
        weights = weights.all_input_nodes[0]
    dimension = weights.kwargs.get("dim", weights.args[1] if len(weights.args) > 1 else None)
    last = getattr(value_of(weights), "ndim", 0) - 1
    if call_name(weights) != "softmax" or dimension not in (-1, last):
        return None
    inner.append(weights)
    scores, mask = weights.all_input_nodes[0], None
    if call_name(scores) in ("add", "iadd"):
        inner.append(scores)
        first, mask = _operands(scores)
        if first is None or mask is None:
            return None
        scores = first
    scale: Any = 1.0
    if call_name(scores) in ("mul", "imul", "truediv", "div"):
        inner.append(scores)
        scale, product = _number(scores.args[1]), scores.args[0]
        if scale is None or not isinstance(product, fx.Node) or scores.kwargs:
            return None
        scores = product
        if call_name(inner[-1]) in ("truediv", "div"):
            scale = 1 / scale
    if call_name(scores) not in PRODUCTS:
        return None
    inner.append(scores)
    query, turned = _operands(scores)
    if query is None or turned is None or not _swaps_last(turned):
        return None
    obstacle = ""
    for each in inner:
        if len(each.users) > 1:
            obstacle = f"{each.name} is used elsewhere, too"
    changed = changed_in_place([query, turned, value], node.graph, memory)
    if changed is not None:  # it may be between the first product and the last
        obstacle = f"{changed.name} changes its inputs in place"
    values = (query, turned.all_input_nodes[0], value, mask, dropped, False, scale)
    arguments = {**DEFAULTS, **dict(zip(ORDER, values, strict=False))}
    return Attention(node, arguments, tuple(inner), obstacle)


def _operands(node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """The two of a plain binary operation (without alpha or out), both values of the graph."""
    two = tuple(each for each in node.args if isinstance(each, fx.Node))
    return two if len(two) == len(node.args) == 2 and not node.kwargs else (None, None)


def _number(value: Any) -> float | None:
    """A number, also one that Dynamo left free (dynamic=True), with a guard."""
    value = value_of(value) if isinstance(value, fx.Node) else value
    return float(value) if isinstance(value, (int, float, torch.SymFloat)) and value else None


def _dropout(node: fx.Node) -> float:
    """Its probability; 0 where it does nothing."""
    given = {**dict(zip(("input", "p", "training"), node.args, strict=False)), **node.kwargs}
    return _number(given.get("p", 0.5)) or 0.0 if given.get("training", True) else 0.0


def _swaps_last(node: fx.Node) -> bool:
    """Whether a node turns [.., tokens, width] into [.., width, tokens]."""
    before = value_of(node.all_input_nodes[0]) if node.all_input_nodes else None
    if not isinstance(before, Tensor) or before.dim() < 2:
        return False
    if call_name(node) in ("transpose", "swapaxes", "swapdims"):
        two = {each % before.dim() for each in node.args[1:] if isinstance(each, int)}
        return two == {before.dim() - 2, before.dim() - 1}
    return call_name(node) == "getattr" and node.args[1] == "mT"


def without_copies(attention: Attention, memory: Memory) -> dict[str, Any]:
    """Key and value as they were before their heads were repeated for the query heads.

    transformers repeats them (`repeat_kv`): a new dimension, expanded and merged with the heads.
    """
    found = {}
    for name in ("key", "value"):
        merged = attention.arguments[name]
        source = _repeated(merged, memory) if isinstance(merged, fx.Node) else None
        if source is None:
            return {}
        found[name] = source
    return found


def _repeated(merged: fx.Node, memory: Memory) -> fx.Node | None:
    expanded = merged.all_input_nodes[0] if call_name(merged) in ("reshape", "flatten") else None
    if expanded is None or call_name(expanded) != "expand":
        return None
    lifted = expanded.all_input_nodes[0]
    if call_name(lifted) != "getitem" or len(lifted.all_input_nodes) != 1:
        return None  # with a tensor as index it may reorder
    source = lifted.all_input_nodes[0]
    before, between, after = (value_of(node) for node in (source, expanded, merged))
    if not all(isinstance(each, Tensor) for each in (before, between, after)) or before.dim() != 4:
        return None
    batch, heads, tokens, width = before.shape
    lifts = value_of(lifted).shape == (batch, heads, 1, tokens, width)
    expands = between.dim() == 5 and between.shape[:2] == (batch, heads)
    merges = after.shape == (batch, heads * between.shape[2], tokens, width)
    if not (lifts and expands and merges):
        return None
    return None if changed_in_place([source, merged], merged.graph, memory) else source
