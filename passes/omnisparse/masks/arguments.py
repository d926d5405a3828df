"""What a node of a graph calls, and with which arguments, for the rules of `elements`.

Whatever is not understood raises `UnknownError`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from ...graph.nodes import call_name, value_of
from .cases import Value
from .elements import UnknownError
from .linear import Linear, size_of

__all__ = [
    "dimension_of", "dimensions_of", "fixed_number", "given", "is_tensor", "scalar", "source_of",
    "tensor", "torch_name", "whole_number",
]  # fmt: skip

# Say where and how a tensor is kept; its type is in its fake value.
ABOUT_MEMORY = {
    "dtype", "device", "layout", "requires_grad", "pin_memory", "memory_format", "non_blocking",
    "copy", "implicit", "names",
}  # fmt: skip
NAMESPACES = (torch, torch.nn.functional, torch.Tensor)


def torch_name(node: fx.Node) -> str:
    """The name of torch's own function, method or operator; an empty one for all else.

    Those of `operator` come without underscores: `and`, `invert`.
    """
    target, name = node.target, call_name(node)
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1] if target.namespace == "aten" else ""
    if isinstance(target, torch._ops.OpOverloadPacket):
        return name if target._qualified_op_name == f"aten::{name}" else ""
    if node.op == "call_method":
        owner = node.args[0] if node.args else None
        plain = name.strip("_") if name.startswith("__") else name
        return plain if is_tensor(owner) and hasattr(torch.Tensor, name) else ""
    if node.op != "call_function":
        return ""
    if target is getattr or getattr(operator, name, None) is target:
        return name.strip("_")
    return name if any(getattr(each, name, None) is target for each in NAMESPACES) else ""


def given(node: fx.Node, *names: str) -> dict[str, Any]:
    """A call's arguments by name, none but these and those that say how a tensor is kept."""
    if len(node.args) > len(names):
        raise UnknownError
    found = dict(zip(names, node.args, strict=False))
    for name, value in node.kwargs.items():
        plain = "input" if name == "self" else name
        if plain in names:
            found[plain] = value
        elif name not in ABOUT_MEMORY:
            raise UnknownError
    return found


def is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(value_of(value), Tensor)


def tensor(value: Any) -> fx.Node:
    """A node whose value is a tensor."""
    if isinstance(value, fx.Node) and is_tensor(value):
        return value
    raise UnknownError


def source_of(node: fx.Node) -> fx.Node:
    """A call's first argument, a tensor."""
    first = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
    return tensor(first)


def scalar(value: Any) -> Value:
    """A number, also one that depends on sizes."""
    if isinstance(value, fx.Node):
        value = value_of(value)
    if isinstance(value, torch.SymInt):
        number = size_of(value)
        if number is None:
            raise UnknownError
        return number if number.terms else number.constant
    if not isinstance(value, (bool, int, float)):
        raise UnknownError
    return value


def whole_number(value: Any) -> Linear:
    number = scalar(value)
    if isinstance(number, Linear):
        return number
    if isinstance(number, int) or (isinstance(number, float) and number.is_integer()):
        return Linear((), int(number))
    raise UnknownError


def fixed_number(value: Any) -> int:
    number = whole_number(value)
    if number.terms:
        raise UnknownError
    return number.constant


def dimension_of(value: Any, count: int) -> int:
    """Which of so many dimensions; negative ones count from the last."""
    number = fixed_number(value)
    return number + count if number < 0 else number


def dimensions_of(node: fx.Node, count: int) -> list[int]:
    """Those that are listed after a call's first argument, or as `dims`."""
    dims = node.args[1:] or (node.kwargs.get("dims"),)
    if len(dims) == 1 and isinstance(dims[0], (tuple, list)):
        dims = tuple(dims[0])
    return [dimension_of(each, count) for each in dims]
