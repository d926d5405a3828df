"""Rules for calls that compute each element from the same elements of their arguments.

Numbers are computed as torch computes them. Arithmetic and comparisons of whole numbers that are
linear in indices and sizes are done on these, where the type that torch computes in holds them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ...graph.nodes import value_of
from .arguments import given, is_tensor, scalar, tensor, torch_name
from .cases import Value, combine, holds
from .elements import EXACT, Elements, Indices, Rule, UnknownError
from .linear import Linear

__all__ = ["POINTWISE", "difference"]

Number = bool | int | float | Linear
DIVISIONS = ("div", "divide", "true_divide", "truediv")


def _operand(elements: Elements, value: Any, indices: Indices) -> Value:
    return elements.broadcast(value, indices) if is_tensor(value) else scalar(value)


def _where(elements: Elements, node: fx.Node, indices: Indices) -> Value:
    names = ("condition", "input", "other")
    if node.op == "call_method":
        names = ("input", "condition", "other")
    found = given(node, *names)
    return _chosen(elements, indices, *(found[each] for each in ("condition", "input", "other")))


def _masked_fill(elements: Elements, node: fx.Node, indices: Indices) -> Value:
    found = given(node, "input", "mask", "value")
    return _chosen(elements, indices, found["mask"], found["value"], found["input"])


def _chosen(elements: Elements, indices: Indices, condition: Any, yes: Any, no: Any) -> Value:
    if value_of(tensor(condition)).dtype != torch.bool:
        raise UnknownError
    values = [_operand(elements, each, indices) for each in (condition, yes, no)]
    return combine(lambda which, one, other: one if which else other, *values)


def _clamp(elements: Elements, node: fx.Node, indices: Indices) -> Value:
    found = given(node, "input", "min", "max")
    arguments = [tensor(found["input"])]
    value = elements.at(arguments[0], indices)
    for name, choose in (("min", _larger), ("max", _smaller)):
        if found.get(name) is not None:
            limit = _operand(elements, found[name], indices)
            value = combine(_on_numbers(choose, elements, node, indices), value, limit)
    return value


def _on_numbers(
    function: Callable[..., Value | None], elements: Elements, node: fx.Node, indices: Indices
) -> Callable[..., Value]:
    """The function of leaves, or the node's own entry where it does not say what they give."""

    def of(*leaves: Value) -> Value:
        found = None
        if all(isinstance(each, (int, float, Linear)) and each == each for each in leaves):
            found = function(*leaves)
        return elements.entry(node, indices) if found is None else found

    return of


def _by_element(on_linear: Callable[..., Value | None] | None = None) -> Rule:
    """on_linear: what the operation is for numbers of which some are linear; None: not known."""

    def rule(elements: Elements, node: fx.Node, indices: Indices) -> Value:
        arguments = list(node.args)
        if len(arguments) == 1 and "other" in node.kwargs:
            arguments.append(node.kwargs["other"])
        if len(arguments) != len(node.args) + len(node.kwargs):
            raise UnknownError
        operands = [_operand(elements, each, indices) for each in arguments]

        def function(*leaves: Value) -> Value | None:
            if not any(isinstance(each, Linear) for each in leaves):
                return _computed(node, arguments, leaves)
            if on_linear is None or not _exact(elements, arguments, leaves):
                return None
            return on_linear(*leaves)

        return combine(_on_numbers(function, elements, node, indices), *operands)

    return rule


def _computed(node: fx.Node, arguments: list[Any], leaves: tuple[Any, ...]) -> Value:
    """What torch gives for tensors of one element."""
    if torch_name(node) in DIVISIONS and leaves[-1] == 0:
        raise UnknownError  # by 0 or by -0, which count as equal here
    operands: list[Any] = [
        torch.full((1,) * value_of(each).dim(), leaf, dtype=value_of(each).dtype)
        if is_tensor(each) else leaf
        for each, leaf in zip(arguments, leaves, strict=True)
    ]  # fmt: skip
    target: Any = node.target
    if node.op == "call_method":
        result = getattr(operands[0], target)(*operands[1:])
    else:
        result = target(*operands)
    if result.dtype != value_of(node).dtype:  # as autocast may have made it
        raise UnknownError
    number: bool | int | float = result.item()
    return number


def _exact(elements: Elements, arguments: list[Any], leaves: tuple[Any, ...]) -> bool:
    """Whether the type in which torch computes holds all that the leaves may be."""
    kinds: list[Any] = [
        value_of(each) if is_tensor(each) else leaf if isinstance(leaf, float) else 0
        for each, leaf in zip(arguments, leaves, strict=True)
    ]  # fmt: skip
    if len(kinds) > 2:
        return False
    dtype = kinds[0].dtype if len(kinds) == 1 else torch.result_type(*kinds)
    limit = EXACT.get(dtype, -1)
    for leaf in leaves:
        if isinstance(leaf, Linear):
            held = elements.within(leaf, limit)
        elif isinstance(leaf, float) and dtype.is_floating_point and math.isfinite(leaf):
            rounded = torch.tensor(leaf, dtype=torch.float64).to(dtype).item()
            held = _between(rounded) == _between(leaf)
        else:
            held = not isinstance(leaf, int) or abs(leaf) <= limit
        if not held:
            return False
    return True


def _between(number: float) -> tuple[int, int] | None:
    """The whole numbers around one. Comparing it to whole numbers asks for no more."""
    return (math.floor(number), math.ceil(number)) if math.isfinite(number) else None


def _whole(leaf: Number) -> Linear | None:
    if isinstance(leaf, Linear):
        return leaf
    if isinstance(leaf, float) and not leaf.is_integer():
        return None
    return Linear((), int(leaf))


def _sum(one: Number, other: Number) -> Linear | None:
    first, second = _whole(one), _whole(other)
    return None if first is None or second is None else first + second


def difference(one: Number, other: Number) -> Linear | None:
    """One minus the other, where both are whole."""
    first, second = _whole(one), _whole(other)
    return None if first is None or second is None else first - second


def _product(one: Number, other: Number) -> Linear | None:
    first, second = _whole(one), _whole(other)
    if first is None or second is None:
        return None
    if second.terms:
        first, second = second, first
    return None if second.terms else first * second.constant


def _at_least(one: Number, other: Number) -> Value | None:
    """Whether one >= other. At most one of them is not whole, and none is NaN."""
    if one == math.inf or other == -math.inf:
        return True
    if one == -math.inf or other == math.inf:
        return False
    lower = one if isinstance(one, Linear) else math.floor(one)
    upper = other if isinstance(other, Linear) else math.ceil(other)
    found = difference(lower, upper)
    return None if found is None else holds(found)


def _at_most(one: Number, other: Number) -> Value | None:
    return _at_least(other, one)


def _not(function: Callable[..., Value | None]) -> Callable[..., Value | None]:
    def of(*leaves: Number) -> Value | None:
        value = function(*leaves)
        return None if value is None else combine(operator.not_, value)

    return of


def _equal(one: Number, other: Number) -> Value | None:
    above, below = _at_least(one, other), _at_least(other, one)
    if above is None or below is None:
        return None
    return combine(lambda first, second: first and second, above, below)


def _larger(one: Number, other: Number) -> Value | None:
    first, second, order = _whole(one), _whole(other), _at_least(one, other)
    if first is None or second is None or order is None:
        return None
    return combine(lambda which: first if which else second, order)


def _smaller(one: Number, other: Number) -> Value | None:
    first, second, order = _whole(one), _whole(other), _at_most(one, other)
    if first is None or second is None or order is None:
        return None
    return combine(lambda which: first if which else second, order)


def _negative(one: Number) -> Linear | None:
    return _product(one, -1)


def _absolute(one: Number) -> Value | None:
    return _larger(one, -one)


POINTWISE: dict[str, Rule] = {
    "where": _where,
    "masked_fill": _masked_fill,
    **dict.fromkeys(("clamp", "clip"), _clamp),
    **dict.fromkeys(("add",), _by_element(_sum)),
    **dict.fromkeys(("sub", "subtract"), _by_element(difference)),
    "rsub": _by_element(lambda one, other: difference(other, one)),
    **dict.fromkeys(("mul", "multiply"), _by_element(_product)),
    **dict.fromkeys(("neg", "negative"), _by_element(_negative)),
    **dict.fromkeys(("abs", "absolute"), _by_element(_absolute)),
    "maximum": _by_element(_larger),
    "minimum": _by_element(_smaller),
    **dict.fromkeys(("ge", "greater_equal"), _by_element(_at_least)),
    **dict.fromkeys(("le", "less_equal"), _by_element(_at_most)),
    **dict.fromkeys(("lt", "less"), _by_element(_not(_at_least))),
    **dict.fromkeys(("gt", "greater"), _by_element(_not(_at_most))),
    "eq": _by_element(_equal),
    **dict.fromkeys(("ne", "not_equal"), _by_element(_not(_equal))),
    **dict.fromkeys(
        ("and", "or", "xor", "invert", "inv", "logical_and", "logical_or", "logical_xor",
         "logical_not", "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not", *DIVISIONS),
        _by_element(),
    ),
}  # fmt: skip
