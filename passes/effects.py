"""Which nodes of a graph change something: memory, randomness, global state."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from .graphs import call_name, descendants, value_of

__all__ = ["changed_in_place", "is_pure", "mutated", "storage_root", "unsafe_effect"]

_IMPURE_FUNCTIONS = {
    torch._C._set_grad_enabled,
    torch._assert,
    torch._assert_async,
    operator.delitem,
}
_RANDOM = {
    "rand", "randn", "rand_like", "randn_like", "randint", "bernoulli", "multinomial", "normal",
    "randperm",
}  # fmt: skip
IN_PLACE_OPERATORS = frozenset(
    {"iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "iand", "ior", "ixor", "imatmul"}
)
IN_PLACE_METHODS = IN_PLACE_OPERATORS | {"add_", "mul_", "sub_", "div_", "copy_", "fill_", "zero_",
                                         "cumsum_", "clamp_", "relu_", "silu_"}  # fmt: skip

# Calls whose result may share memory with their first input.
VIEWS = frozenset({
    "view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "expand", "getitem", "chunk",
    "split", "unbind", "flatten", "unflatten", "contiguous", "to", "float", "type_as", "detach",
    "narrow", "select", "view_as", "expand_as", "movedim", "t", "T", "real", "imag", "getattr",
    "split_with_sizes", "tensor_split", "dropout", "identity", "alias", "swapaxes", "half",
    "bfloat16", "double", "view_as_real", "view_as_complex", "moveaxis", "swapdims", "mT",
})  # fmt: skip


def is_pure(node: fx.Node) -> bool:
    """Whether a node only computes its result (no randomness, mutation or global effect)."""
    if node.op in ("placeholder", "get_attr", "output"):
        return True
    if node.op not in ("call_function", "call_method"):
        return False
    name = call_name(node)
    if node.target in _IMPURE_FUNCTIONS or name in _RANDOM:
        return False
    if "autocast" in name or "vmap" in name or "batch_dim" in name:
        return False  # they open and close a scope
    return mutated(node) is None


def storage_root(node: fx.Node) -> fx.Node:
    """The node whose memory `node` may be a view of (itself, where it is no view)."""
    while node.op.startswith("call") and _may_share(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _may_share(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload):
        return any(each.alias_info is not None for each in node.target._schema.returns)
    return call_name(node) in VIEWS | IN_PLACE_METHODS


def mutated(node: fx.Node) -> fx.Node | None:
    """The tensor that a node changes in place; None where it changes nothing."""
    if node.op not in ("call_function", "call_method") or not node.all_input_nodes:
        return None
    name = call_name(node)
    if isinstance(node.target, torch._ops.OpOverload):
        return _written(node, node.target)
    in_place = name == "setitem" or (
        isinstance(value_of(node.all_input_nodes[0]), torch.Tensor)
        and (
            name in IN_PLACE_METHODS
            or (node.op == "call_method" and name.endswith("_") and not name.endswith("__"))
            or (
                node.op == "call_function"
                and name.endswith("_")
                and not name.startswith("_")
                and getattr(operator, name, None) is not node.target
            )
            or (name in IN_PLACE_OPERATORS and getattr(operator, name) is node.target)
            or _asked_in_place(node)
        )
    )
    if in_place:
        return node.all_input_nodes[0]
    out = node.kwargs.get("out")
    return out if isinstance(out, fx.Node) else None


def _asked_in_place(node: fx.Node) -> bool:
    """Whether a function such as `relu` is called with `inplace`, by name or by position."""
    if node.kwargs.get("inplace") is True:
        return True
    function: Any = node.target
    if getattr(function, "__module__", "") != "torch.nn.functional":
        return False
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a builtin says nothing of its arguments
        return False
    return dict(zip(names, node.args, strict=False)).get("inplace") is True


def _written(node: fx.Node, operator: torch._ops.OpOverload) -> fx.Node | None:
    """The first tensor that an operator's schema says it writes to."""
    arguments = operator._schema.arguments
    given = dict(zip((each.name for each in arguments), node.args, strict=False)) | node.kwargs
    for each in arguments:
        value = given.get(each.name)
        if each.is_write and isinstance(value, fx.Node):
            return value
    return node.all_input_nodes[0] if operator._schema.is_mutable else None  # one of a list


def changed_in_place(nodes: Iterable[fx.Node], graph: fx.Graph) -> fx.Node | None:
    """A node that writes to the memory of one of `nodes`, if there is one."""
    roots = {storage_root(node) for node in nodes}
    for node in graph.nodes:
        target = mutated(node)
        if target is not None and storage_root(target) in roots:
            return node
    return None


def unsafe_effect(region: Sequence[fx.Node], graph: fx.Graph) -> fx.Node | None:
    """A node because of which a region can't be cut out, if there is one.

    That is: randomness or a global effect inside; a change in place of anything that the region
    did not make itself; and a change, outside, of anything that it reads.
    """
    inside = set(region)
    for node in region:
        target = mutated(node)
        if target is None and not is_pure(node):
            return node
        if target is not None and storage_root(target) not in inside:
            return node
    order = {node: position for position, node in enumerate(graph.nodes)}
    readers: dict[fx.Node, int] = {}
    for node in region:
        for source in node.all_input_nodes:
            root = storage_root(source)
            readers[root] = min(order[node], readers.get(root, order[node]))
    dependent = descendants(region)
    for node in graph.nodes:
        target = None if node in inside else mutated(node)
        if target is None or not order[region[0]] < order[node] < order[region[-1]]:
            continue
        # `gather` moves it before the region, or behind it where it depends on the region.
        root = storage_root(target)
        if root in readers and (node in dependent or readers[root] < order[node]):
            return node
    return None
