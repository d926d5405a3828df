"""Rules: how the elements of a call's result come from those of its arguments (see `elements`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...graph.nodes import value_of
from .arguments import (
    dimension_of,
    dimensions_of,
    fixed_number,
    given,
    is_tensor,
    scalar,
    source_of,
    tensor,
    torch_name,
    whole_number,
)
from .cases import Value, combine, holds
from .elements import Elements, Indices, Rule, UnknownError, is_one
from .linear import Linear, size_of
from .pointwise import POINTWISE, difference

__all__ = ["rule_of"]


def rule_of(node: fx.Node) -> Rule | None:
    """The rule for what a node calls, if there is one."""
    return RULES.get(torch_name(node))


def _replaced(indices: Indices, dimension: int, index: Linear) -> Indices:
    return (*indices[:dimension], index, *indices[dimension + 1 :])


def _same_size(one: Any, other: Any) -> bool:
    if isinstance(one, torch.SymInt) and isinstance(other, torch.SymInt):
        return bool(one.node.expr == other.node.expr)
    return isinstance(one, int) and isinstance(other, int) and one == other


# Tensors of one value, and of positions.


def _filled(*names: str) -> Rule:
    """A tensor full of the argument `fill_value`."""

    def rule(elements: Elements, node: fx.Node, indices: Indices) -> Value:
        return scalar(given(node, *names)["fill_value"])

    return rule


def _full_of(number: int) -> Rule:
    return lambda elements, node, indices: number


def _arange(elements: Elements, node: fx.Node, indices: Indices) -> Value:
    found = given(node, *(("end",) if len(node.args) == 1 else ("start", "end", "step")))
    return whole_number(found.get("start", 0)) + indices[0] * fixed_number(found.get("step", 1))


# Tensors that hold another one's elements at other indices.


def _kept(elements: Elements, node: fx.Node, indices: Indices) -> Value:
    """The same at the same indices, perhaps of another type."""
    return elements.at(source_of(node), indices)


def _reshaped(elements: Elements, node: fx.Node, indices: Indices) -> Value:
    """Dimensions of size 1 come and go."""
    source = source_of(node)
    before, after = value_of(source), value_of(node)
    wide = [dim for dim, size in enumerate(before.shape) if not is_one(size)]
    moved = [dim for dim, size in enumerate(after.shape) if not is_one(size)]
    if before.dtype != after.dtype or len(wide) != len(moved):
        raise UnknownError
    found = [Linear()] * before.dim()
    for old, new in zip(wide, moved, strict=True):
        if not _same_size(before.shape[old], after.shape[new]):
            raise UnknownError
        found[old] = indices[new]
    return elements.at(source, tuple(found))


def _expanded(elements: Elements, node: fx.Node, indices: Indices) -> Value:
    return elements.broadcast(source_of(node), indices)


def _permuted(elements: Elements, node: fx.Node, order: list[int], indices: Indices) -> Value:
    """order: for each dimension of the result, which of the source it is."""
    found = dict(zip(order, indices, strict=True))
    return elements.at(source_of(node), tuple(found[dim] for dim in range(len(order))))


def _permute(elements: Elements, node: fx.Node, indices: Indices) -> Value:
    return _permuted(elements, node, dimensions_of(node, len(indices)), indices)


def _swapped(elements: Elements, node: fx.Node, one: int, other: int, indices: Indices) -> Value:
    order = list(range(len(indices)))
    order[one], order[other] = order[other], order[one]
    return _permuted(elements, node, order, indices)


def _transpose(elements: Elements, node: fx.Node, indices: Indices) -> Value:
    if len(node.args) != 3:
        raise UnknownError
    one, other = (dimension_of(each, len(indices)) for each in node.args[1:])
    return _swapped(elements, node, one, other, indices)


def _turned(elements: Elements, node: fx.Node, indices: Indices) -> Value:
    if len(indices) != 2:
        raise UnknownError
    return _swapped(elements, node, 0, 1, indices)


def _matrix_turned(elements: Elements, node: fx.Node, indices: Indices) -> Value:
    if len(indices) < 2:
        raise UnknownError
    return _swapped(elements, node, len(indices) - 2, len(indices) - 1, indices)


def _attribute(elements: Elements, node: fx.Node, indices: Indices) -> Value:
    known = {"data": _kept, "T": _turned, "mT": _matrix_turned}
    rule = known.get(str(node.args[1]))
    if rule is None:
        raise UnknownError
    return rule(elements, node, indices)


def _flip(elements: Elements, node: fx.Node, indices: Indices) -> Value:
    source = source_of(node)
    for dim in dimensions_of(node, len(indices)):
        size = size_of(value_of(source).shape[dim])
        if size is None:
            raise UnknownError
        indices = _replaced(indices, dim, size - 1 - indices[dim])
    return elements.at(source, indices)


def _start(given: Any, size: Any) -> Linear:
    """Where a slice starts."""
    start = Linear() if given is None else whole_number(given)
    if start.terms:  # it may be negative
        raise UnknownError
    if start.constant >= 0:
        return start
    length = size_of(size)
    if length is None or length.terms:
        raise UnknownError
    return Linear((), max(start.constant + length.constant, 0))


def _slice(elements: Elements, node: fx.Node, indices: Indices) -> Value:
    """The operator `aten::slice`."""
    found = given(node, "input", "dim", "start", "end", "step")
    source = tensor(found["input"])
    dim = dimension_of(found.get("dim", 0), len(indices))
    start = _start(found.get("start"), value_of(source).shape[dim])
    own = start + indices[dim] * fixed_number(found.get("step", 1))
    return elements.at(source, _replaced(indices, dim, own))


def _narrow(elements: Elements, node: fx.Node, indices: Indices) -> Value:
    found = given(node, "input", "dim", "start", "length")
    source = tensor(found["input"])
    dim = dimension_of(found["dim"], len(indices))
    start = _start(found["start"], value_of(source).shape[dim])
    return elements.at(source, _replaced(indices, dim, start + indices[dim]))


def _select(elements: Elements, node: fx.Node, indices: Indices) -> Value:
    found = given(node, "input", "dim", "index")
    source = tensor(found["input"])
    dim = dimension_of(found["dim"], len(indices) + 1)
    own = _position(whole_number(found["index"]), value_of(source).shape[dim])
    return elements.at(source, (*indices[:dim], own, *indices[dim:]))


def _position(index: Linear, size: Any) -> Linear:
    """One that may count from the end."""
    if index.terms:
        raise UnknownError
    length = size_of(size)
    if index.constant >= 0:
        return index
    if length is None:
        raise UnknownError
    return length + index


def _getitem(elements: Elements, node: fx.Node, indices: Indices) -> Value:
    if isinstance(node.args[0], fx.Node) and not is_tensor(node.args[0]):
        return _one_of_several(elements, node, indices)
    source = source_of(node)
    items = node.args[1] if isinstance(node.args[1], (tuple, list)) else (node.args[1],)
    shape = value_of(source).shape
    items = _without_ellipsis(list(items), len(shape))
    tensors = [each for each in items if is_tensor(each)]
    if not tensors:
        return elements.at(source, _basic(items, shape, list(indices)))
    if any(isinstance(value_of(each) if isinstance(each, fx.Node) else each, (int, torch.SymInt))
           and not is_tensor(each) for each in items):  # fmt: skip
        raise UnknownError  # numbers among tensors: the order of dimensions is a matter of its own
    places = [place for place, each in enumerate(items) if is_tensor(each)]
    together = places[-1] - places[0] + 1 == len(places)
    count = max(value_of(each).dim() for each in tensors)
    first = places[0] if together else 0  # before it, each item is one dimension of the result
    shared, rest = indices[first : first + count], [*indices[:first], *indices[first + count :]]
    found: list[Linear] = []
    for item in items:
        dim = len(found)
        if not is_tensor(item):
            found += _basic([item], shape[dim:], [rest.pop(0)])
            continue
        if value_of(item).dtype in (torch.bool, torch.uint8):
            raise UnknownError
        found.append(_looked_up(elements, elements.broadcast(item, shared), shape[dim]))
    return elements.at(source, tuple(found))


def _without_ellipsis(items: list[Any], dimensions: int) -> list[Any]:
    used = sum(each is not None and each is not Ellipsis for each in items)
    missing = [slice(None)] * (dimensions - used)
    for place, each in enumerate(items):
        if each is Ellipsis:
            return [*items[:place], *missing, *items[place + 1 :]]
    return items + missing


def _basic(items: list[Any], shape: Any, indices: list[Linear]) -> Indices:
    """Numbers, slices and new dimensions: the source's indices for those of the result."""
    found: list[Linear] = []
    for item in items:
        if item is None:
            indices.pop(0)
        elif isinstance(item, slice):
            start = _start(item.start, shape[len(found)])
            step = 1 if item.step is None else fixed_number(item.step)
            found.append(start + indices.pop(0) * step)
        elif isinstance(item, bool):
            raise UnknownError
        else:
            found.append(_position(whole_number(item), shape[len(found)]))
    return tuple(found)


def _looked_up(elements: Elements, value: Value, size: Any) -> Linear:
    """The index that a tensor of indices holds."""
    if isinstance(value, int) and not isinstance(value, bool):
        return _position(Linear((), value), size)
    if not isinstance(value, Linear) or not elements.impossible([-value - 1]):
        raise UnknownError  # a negative one counts from the end
    return value


def _one_of_several(elements: Elements, node: fx.Node, indices: Indices) -> Value:
    call, place = node.args
    if not isinstance(call, fx.Node) or not isinstance(place, int):
        raise UnknownError
    name = torch_name(call)
    parts: Any = call.args[0] if isinstance(call.args[0], (tuple, list)) else call.args
    if name == "broadcast_tensors":
        return elements.broadcast(tensor(parts[place]), indices)
    if name == "meshgrid" and all(value_of(each).dim() == 1 for each in parts):
        order = list(range(len(parts)))
        if call.kwargs.get("indexing", "ij") == "xy" and len(parts) > 1:
            order[:2] = [1, 0]
        return elements.at(tensor(parts[place]), (indices[order.index(place % len(parts))],))
    raise UnknownError


# Tensors whose elements depend on where they are.


def _triangle(sign: int) -> Rule:
    """sign: 1 for the lower one, -1 for the upper."""

    def rule(elements: Elements, node: fx.Node, indices: Indices) -> Value:
        found = given(node, "input", "diagonal")
        *_, row, column = indices
        inside = (row - column + whole_number(found.get("diagonal", 0))) * sign
        value = elements.at(tensor(found["input"]), indices)
        return combine(lambda keeps, own: own if keeps else 0, holds(inside), value)

    return rule


def _cumsum(elements: Elements, node: fx.Node, indices: Indices) -> Value:
    """Of one number everywhere."""
    found = given(node, "input", "dim")
    source, dim = tensor(found["input"]), dimension_of(found["dim"], len(indices))
    size = size_of(value_of(source).shape[dim])
    longest = 0 if size is None else size.bounds(elements.ranges)[1]
    value = elements.at(source, _replaced(indices, dim, elements.another(longest)))
    return (indices[dim] + 1) * fixed_number(value)


def _diff(elements: Elements, node: fx.Node, indices: Indices) -> Value:
    """To the next, or from the one before, of which the first is given (`prepend`)."""
    found = given(node, "input", "n", "dim", "prepend", "append")
    source, prepend = tensor(found["input"]), found.get("prepend")
    if found.get("n", 1) != 1 or found.get("append") is not None:
        raise UnknownError
    if value_of(source).dtype == torch.bool:
        raise UnknownError
    dim = dimension_of(found.get("dim", -1), len(indices))

    def at(node: fx.Node, index: Linear) -> Value:
        return elements.at(node, _replaced(indices, dim, index))

    own = indices[dim]
    if prepend is None:
        return combine(_minus, at(source, own + 1), at(source, own))
    if not is_one(value_of(tensor(prepend)).shape[dim]):
        raise UnknownError
    first = combine(_minus, at(source, Linear()), at(prepend, Linear()))
    later = combine(_minus, at(source, own), at(source, own - 1))
    return combine(lambda yes, one, two: one if yes else two, holds(own - 1), later, first)


def _minus(one: Value, other: Value) -> Value:
    if not isinstance(one, (int, Linear)) or not isinstance(other, (int, Linear)):
        raise UnknownError
    found = difference(one, other)
    if found is None:
        raise UnknownError
    return found


RULES: dict[str, Rule] = {
    **POINTWISE,
    "arange": _arange,
    "full": _filled("size", "fill_value"),
    "new_full": _filled("input", "size", "fill_value"),
    "full_like": _filled("input", "fill_value"),
    **dict.fromkeys(("tensor", "scalar_tensor"), _filled("fill_value")),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _full_of(1)),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), _full_of(0)),
    **dict.fromkeys(
        ("to", "type", "type_as", "bool", "int", "long", "short", "char", "half", "bfloat16",
         "float", "double", "contiguous", "clone", "detach", "alias", "cpu", "cuda", "_to_copy",
         "lift_fresh_copy"),
        _kept,
    ),
    **dict.fromkeys(
        ("unsqueeze", "squeeze", "view", "reshape", "flatten", "unflatten", "view_as",
         "reshape_as"),
        _reshaped,
    ),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expanded),
    "permute": _permute,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transpose),
    # torch 2.14 has operators in place of attributes.
    **dict.fromkeys(("t", "numpy_T"), _turned),
    "mT": _matrix_turned,
    "getattr": _attribute,
    "flip": _flip,
    "slice": _slice,
    "narrow": _narrow,
    "select": _select,
    "getitem": _getitem,
    "tril": _triangle(1),
    "triu": _triangle(-1),
    "cumsum": _cumsum,
    "diff": _diff,
}  # fmt: skip
