"""What of a graph depends on an id alone, row by row, or on the model's tensors alone."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import embedding

from ..graph.facts import facts_of
from ..graph.nodes import call_name, is_model_state, value_of
from .rows import POINTWISE, is_off

__all__ = ["Rows", "analysed", "lookup_of"]

REDUCING = {"argmax", "argmin", "mean", "sum"}
NORMALIZING = {"log_softmax", "softmax"}
COSTLY = {"argmax", "argmin", "layer_norm", "linear", "matmul"}


@dataclass(frozen=True)
class Rows:
    """A value whose rows depend on an id each: value[i, j] on ids[i, j]. count: of ids there can
    be; found: by `embedding`, which refuses others."""

    ids: fx.Node
    count: int
    found: bool
    costly: bool

    def tail(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of a row of the value of `node`."""
        return tuple(int(size) for size in value_of(node).shape[value_of(self.ids).dim() :])

    def bytes(self, node: fx.Node) -> int:
        """Of a table of all rows."""
        return self.count * math.prod(self.tail(node)) * int(value_of(node).element_size())


def analysed(graph: fx.Graph) -> tuple[set[fx.Node], dict[fx.Node, Rows]]:
    """What depends on the model's tensors alone, and what is a function of ids, row by row."""
    state: set[fx.Node] = set()
    rows: dict[fx.Node, Rows] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            if is_model_state(node) and isinstance(value_of(node), Tensor):
                state.add(node)
            continue
        if node.op not in ("call_function", "call_method"):
            continue
        inputs = node.all_input_nodes
        if not isinstance(value_of(node), Tensor):
            continue
        worth = call_name(node) in POINTWISE | REDUCING | {"t", "transpose", "matmul", "linear"}
        ahead = inputs and worth and all(each in state for each in inputs)
        if ahead and facts_of(node).pure:
            state.add(node)
            continue
        found = _looked_up(node, state) or _carried(node, state, rows)
        if found is not None:
            rows[node] = found
    return state, rows


def lookup_of(node: fx.Node) -> tuple[Any, Any] | None:
    """The ids and the table of a lookup; None where a node is none."""
    args: Any = node.args
    if node.target is operator.getitem:
        return args[1], args[0]
    if node.target is not embedding:
        return None
    names = ("input", "weight", "padding_idx", "max_norm")
    given = dict(zip(names, args, strict=False)) | node.kwargs
    if given.get("max_norm") is not None:
        return None  # it writes to the table
    return given["input"], given["weight"]


def _looked_up(node: fx.Node, state: set[fx.Node]) -> Rows | None:
    """A lookup by ids in one of the model's tensors."""
    ids, table = lookup_of(node) or (None, None)
    if not isinstance(ids, fx.Node) or table not in state or ids in state:
        return None
    value = value_of(ids)
    if not isinstance(value, Tensor) or value.dtype not in (torch.int64, torch.int32):
        return None
    found = node.target is embedding
    return Rows(ids, int(value_of(table).shape[0]), found, costly=False)


def _carried(node: fx.Node, state: set[fx.Node], rows: dict[fx.Node, Rows]) -> Rows | None:
    """What an operation that treats each row alone makes of rows."""
    sources = [each for each in node.all_input_nodes if each in rows]
    if not sources or any(each not in state and each not in rows for each in node.all_input_nodes):
        return None
    first = rows[sources[0]]
    if any(rows[each].ids is not first.ids for each in sources):
        return None
    counts = {rows[each].count for each in sources}
    if len(counts) > 1 and not all(rows[each].found for each in sources):
        return None  # negative ids count from the end of each table
    if not _treats_rows_alone(node, sources, state, value_of(first.ids).dim()):
        return None
    return Rows(
        first.ids,
        min(counts),
        all(rows[each].found for each in sources),
        call_name(node) in COSTLY or any(rows[each].costly for each in sources),
    )


def _treats_rows_alone(
    node: fx.Node, sources: list[fx.Node], state: set[fx.Node], outer: int
) -> bool:
    """outer: how many dimensions the ids have; those behind are a row's own."""
    args: Any = node.args
    name, kwargs = call_name(node), node.kwargs
    inner = value_of(sources[0]).dim() - outer
    if name in POINTWISE or (name == "dropout" and is_off(node)):
        tensors = [value_of(each) for each in node.all_input_nodes if each not in sources]
        alike = all(value_of(each).dim() == value_of(sources[0]).dim() for each in sources)
        return alike and all(each.dim() <= inner for each in tensors)
    if inner < 1 or len(sources) > 1 or not args or args[0] is not sources[0]:
        return False
    others = [*args[1:], *kwargs.values()]
    if any(isinstance(each, fx.Node) and each not in state for each in others):
        return False  # rows as the other operand, too
    if name == "linear":
        return True
    if name == "matmul":
        return inner == 1 and len(args) == 2 and value_of(args[1]).dim() == 2
    if name == "layer_norm":
        return len(args) > 1 and len(args[1]) <= inner
    if name in REDUCING or name in NORMALIZING:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        last = value_of(sources[0]).dim() - 1
        return dim in (-1, last) and last >= outer and not kwargs.get("keepdim", False)
    return False
