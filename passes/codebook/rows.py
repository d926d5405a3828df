"""What is selected after operations that treat each row alone is selected before them.

A recommender runs a transformer over a history and reads the last item's state. Of the last block,
all but keys and values is then needed for one row. Before:

    states = states + mlp(norm(states))
    last = states[:, -1]

After:

    last = states[:, -1]
    last = last + mlp(norm(last))
"""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx
from torch.nn.functional import scaled_dot_product_attention

from ..graph.emit import emit
from ..graph.facts import facts_of
from ..graph.nodes import call_name, value_of

__all__ = ["POINTWISE", "is_off", "select_early"]

# Each element by itself, whatever its neighbours are.
POINTWISE = {
    "abs", "add", "clamp", "clone", "contiguous", "detach", "div", "exp", "gelu", "leaky_relu",
    "log", "mul", "neg", "pow", "relu", "sigmoid", "silu", "softplus", "softsign", "sqrt",
    "square", "sub", "tanh", "truediv",
}  # fmt: skip
EVERY = slice(None)


def select_early(graph: fx.Graph) -> int:
    """Move selections to before what they can be before of; how many operations are now done for
    one row. Each stays where it was in the order, so that changes in place come before or after as
    they did."""
    moved, again = 0, True
    while again:
        again = False
        for node in reversed(list(graph.nodes)):
            place = _selection(node)
            if place is None or any(_selection(each) != place for each in node.args[0].users):
                continue
            with graph.inserting_before(node.args[0]):
                earlier = _computed_for(node.args[0], *place)
            if earlier is None:
                continue
            source = node.args[0]
            for each in list(source.users):
                each.replace_all_uses_with(earlier)
                graph.erase_node(each)
            graph.erase_node(source)
            moved, again = moved + 1, True
            break
    return moved


def _selection(node: fx.Node) -> tuple[int, int] | None:
    """The dimension and the place of `x[:, ..., place]`; None for all else."""
    if node.target is not operator.getitem or not isinstance(value_of(node), Tensor):
        return None
    source, index = node.args
    if not isinstance(source, fx.Node) or not isinstance(value_of(source), Tensor):
        return None
    places = index if isinstance(index, tuple) else (index,)
    if not places or type(places[-1]) is not int or any(each != EVERY for each in places[:-1]):
        return None
    return len(places) - 1, places[-1]


def _at(source: Any, dim: int, place: int) -> Any:
    """source[:, ..., place]."""
    return emit(source.graph, operator.getitem, source, (*[EVERY] * dim, place))


def _computed_for(node: fx.Node, dim: int, place: int) -> fx.Node | None:
    """What `node[:, ..., place]` is, with the place of `node`'s inputs selected before."""
    if node.op not in ("call_function", "call_method") or facts_of(node).writes:
        return None
    if any(isinstance(each, fx.Node) for each in node.kwargs.values()):
        return None
    name, rank = call_name(node), value_of(node).dim()
    args: Any = node.args
    if name in POINTWISE or (name == "dropout" and is_off(node)):
        if name in ("clone", "contiguous") and (len(args) > 1 or node.kwargs):
            return None  # a layout of so many dimensions
        chosen = [_operand(each, dim - rank, place) for each in args]
    elif name in ("linear", "layer_norm") and len(args) > 1:
        inner = 1 if name == "linear" else len(args[1])
        if dim >= rank - inner:
            return None
        chosen = [_at(args[0], dim, place), *args[1:]]
    elif name == "flatten" and len(args) == 2 and dim < args[1] and not node.kwargs:
        chosen = [_at(args[0], dim, place), args[1] - 1]
    elif name == "transpose" and len(args) == 3 and dim in (args[1] % rank, args[2] % rank):
        return _of_transposed(args[0], dim, place, args[1] % rank + args[2] % rank - dim)
    elif node.target is scaled_dot_product_attention and dim == rank - 2 and not node.kwargs:
        return None if _is_one(value_of(node).shape[dim]) else _of_attention(args, dim, place)
    else:
        return None
    return _again(node, chosen)


def _operand(operand: Any, behind: int, place: int) -> Any:
    """An operand of a pointwise operation, selected where it has the dimension `behind` (< 0)."""
    if not isinstance(operand, fx.Node) or not isinstance(value_of(operand), Tensor):
        return operand
    shape = value_of(operand).shape
    if len(shape) < -behind:
        return operand
    return _at(operand, len(shape) + behind, 0 if _is_one(shape[behind]) else place)


def _is_one(size: Any) -> bool:
    """Symbols never are: torch gives sizes of 1 none."""
    return isinstance(size, int) and size == 1


def _of_transposed(source: fx.Node, dim: int, place: int, other: int) -> fx.Node | None:
    """source.transpose(dim, other)[:, ..., place]: what is left is in order if they are next to
    each other."""
    return _at(source, other, place) if abs(dim - other) == 1 else None


def _of_attention(args: Any, dim: int, place: int) -> fx.Node | None:
    """For one query, which stays a dimension: query, key, value, mask."""
    if len(args) > 4 or (len(args) == 4 and not isinstance(args[3], (fx.Node, type(None)))):
        return None
    graph, only = args[0].graph, slice(place, place + 1 or None)

    def narrowed(each: Any) -> Any:
        if each is None or value_of(each).dim() < 2 or _is_one(value_of(each).shape[-2]):
            return each
        return emit(graph, operator.getitem, each, (Ellipsis, only, EVERY))

    found = emit(
        graph, scaled_dot_product_attention, narrowed(args[0]), *args[1:3], *map(narrowed, args[3:])
    )
    return _at(found, dim, 0)


def _again(node: fx.Node, args: list[Any]) -> fx.Node:
    """The node's operation on other operands, said to be called where it was."""
    copy = node.graph.node_copy(node)
    copy.args = tuple(args)
    values = [value_of(each) if isinstance(each, fx.Node) else each for each in args]
    function: Any = node.target
    if node.op == "call_method":
        function = getattr(type(values[0]), function)
    copy.meta["example_value"] = function(*values, **node.kwargs)
    return copy


def is_off(dropout: fx.Node) -> bool:
    """Whether a dropout lets everything through."""
    names = ("input", "p", "training")
    given = dict(zip(names, dropout.args, strict=False)) | dropout.kwargs
    return dropout.op == "call_function" and given.get("training", True) is False
