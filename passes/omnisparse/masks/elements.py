"""What an element of a tensor is, as a function of its indices: a graph's nodes, interpreted.

`Elements.at(node, indices)` is a diagram (see `cases`): what the tensor holds at these indices, for
all sizes and all inputs. Each rule says for one kind of call, exactly, how its elements come from
those of its arguments (`rules`). What no rule speaks of is what it is: an `Entry` of that node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ...graph.facts import is_pure
from ...graph.nodes import ancestors, value_of
from .cases import Entry, If, TooManyCasesError, Value, combine, holds
from .linear import Linear, contradictory

__all__ = ["EXACT", "Elements", "Indices", "Rule", "UnknownError"]

Indices = tuple[Linear, ...]
DEEPEST = 60  # calls on one path
LARGEST = 2**30  # entries that are computed, all tensors of a mask together

# The whole numbers that a type holds one by one, from minus this to this.
EXACT = {
    torch.int8: 2**7 - 1, torch.int16: 2**15 - 1, torch.int32: 2**31 - 1, torch.int64: 2**63 - 1,
    torch.bfloat16: 2**8, torch.float16: 2**11, torch.float32: 2**24, torch.float64: 2**53,
}  # fmt: skip


class UnknownError(Exception):
    """No rule says what an element is."""


class Elements:
    """The elements of a graph's tensors.

    rule: for a call, what says how its elements come about, or None. sizes: of each index variable,
    so many values from 0; None where a size is no linear form. ranges: the values that an index
    variable or a symbol of the sizes may take, the last included. seen: the nodes that were read.
    """

    def __init__(
        self,
        rule: Callable[[fx.Node], Rule | None],
        sizes: Mapping[str, Linear | None],
        ranges: Mapping[str, tuple[int, int]],
    ) -> None:
        self.rule, self.sizes, self.ranges = rule, sizes, dict(ranges)
        self.seen: set[fx.Node] = set()
        self._known: dict[tuple[fx.Node, Indices], Value] = {}
        self._closed: dict[fx.Node, bool] = {}
        self._values: dict[fx.Node, Any] = {}
        self._left = LARGEST
        self._depth = 0

    def at(self, node: fx.Node, indices: Indices) -> Value:
        """A tensor's element."""
        key = node, indices
        if key not in self._known:
            self.seen.add(node)
            self._depth += 1
            try:
                self._known[key] = self._fitting(node, self._by_rule(node, indices))
            except (UnknownError, TooManyCasesError):
                self._known[key] = self._as_computed(node, indices)
            finally:
                self._depth -= 1
        return self._known[key]

    def broadcast(self, node: fx.Node, indices: Indices) -> Value:
        """The element of a tensor that is expanded to more or larger dimensions."""
        shape = value_of(node).shape
        if len(shape) > len(indices):
            raise UnknownError
        own = zip(shape, indices[len(indices) - len(shape) :], strict=True)
        return self.at(node, tuple(Linear() if is_one(size) else each for size, each in own))

    def entry(self, node: fx.Node, indices: Indices) -> Entry:
        """What no rule knows more about. Raises UnknownError if computing it tells more."""
        if self._is_closed(node):
            raise UnknownError
        return Entry(node, indices)

    def another(self, longest: int) -> Linear:
        """A new index variable, from 0 and below `longest`."""
        name = f"index {len(self.ranges)}"
        self.ranges[name] = 0, longest - 1
        return Linear.of(name)

    def source(self, node: fx.Node) -> fx.Node:
        """The node without a rule because of which an element is not known; or the node itself."""
        todo, found = [node], set()
        while todo:
            each = todo.pop()
            if self.rule(each) is None:
                return each
            found.add(each)
            todo += [one for one in each.all_input_nodes if one in self.seen - found]
        return node

    def within(self, number: Linear, limit: int) -> bool:
        """Whether a number is between minus `limit` and `limit`, whatever the indices."""
        if not number.variables() <= set(self.ranges):
            return False
        least, greatest = number.bounds(self.ranges)
        return -limit <= least and greatest <= limit

    def impossible(self, conditions: Iterable[Linear]) -> bool:
        """Whether no indices and sizes make all conditions at least 0."""
        rows = list(conditions)
        for variable, size in self.sizes.items():
            rows.append(Linear.of(variable))
            if size is not None:
                rows.append(size - 1 - Linear.of(variable))
        for symbol in {name for row in rows for name in row.variables()} - set(self.sizes):
            if symbol in self.ranges:
                rows.append(Linear.of(symbol) - self.ranges[symbol][0])
        return contradictory(rows)

    def pruned(self, value: Value, *conditions: Linear) -> Value:
        """The diagram without what can't be, where all conditions are at least 0."""
        if not isinstance(value, If):
            return value
        yes, no = conditions, conditions
        if not isinstance(value.condition, Entry):
            number = value.condition.number
            yes, no = (*conditions, number), (*conditions, -number - 1)
            if self.impossible(no):
                return self.pruned(value.yes, *conditions)
            if self.impossible(yes):
                return self.pruned(value.no, *conditions)
        ends = self.pruned(value.yes, *yes), self.pruned(value.no, *no)
        return ends[0] if ends[0] == ends[1] else If(value.condition, *ends)

    def _by_rule(self, node: fx.Node, indices: Indices) -> Value:
        rule = self.rule(node)
        if rule is None or self._depth > DEEPEST:
            raise UnknownError
        return rule(self, node, indices)

    def _fitting(self, node: fx.Node, value: Value) -> Value:
        """A rule's result as the node's type holds it."""
        dtype = value_of(node).dtype

        def of(leaf: Value) -> Value:
            if isinstance(leaf, Linear) and leaf.terms:
                if dtype == torch.bool:
                    return combine(lambda *two: not all(two), holds(leaf), holds(-leaf))
                if not self.within(leaf, EXACT.get(dtype, -1)):
                    raise UnknownError
                return leaf
            if isinstance(leaf, Entry):
                if value_of(leaf.node).dtype != dtype:
                    raise UnknownError
                return If(leaf, True, False) if dtype == torch.bool else leaf
            number: Any = leaf.constant if isinstance(leaf, Linear) else leaf
            widest = torch.float64 if isinstance(number, float) else None
            return torch.tensor(number, dtype=widest).to(dtype).item()

        return combine(of, value)

    def _as_computed(self, node: fx.Node, indices: Indices) -> Value:
        """What computing a tensor shows, if nothing enters it; or else the entry itself."""
        tensor = self.computed(node)
        if isinstance(tensor, Tensor) and tensor.numel():
            first = tensor.flatten()[0]
            if (tensor == first).all():
                return first.item()
            wide = [index for size, index in zip(tensor.shape, indices, strict=True) if size > 1]
            if len(wide) == 2:
                found = _triangle(tensor.squeeze(), *wide)
                if found is not None:
                    return found
        entry = Entry(node, indices)
        return If(entry, True, False) if value_of(node).dtype == torch.bool else entry

    def _is_closed(self, node: fx.Node) -> bool:
        """Whether a value is the same in every run: of fixed sizes, and nothing enters it."""
        if node not in self._closed:
            self._closed[node] = all(
                each.op.startswith("call_") and is_pure(each) and _is_fixed(each)
                for each in ancestors([node])
            )
        return self._closed[node]

    def computed(self, node: fx.Node) -> Any:
        """A value that is the same in every run; None for others, and if it is too large."""
        if not self._is_closed(node):
            return None
        needed = ancestors([node])
        for each in (each for each in node.graph.nodes if each in needed):
            self.seen.add(each)
            if each in self._values:
                continue
            value = value_of(each)
            self._left -= value.numel() if isinstance(value, Tensor) else 0
            if self._left < 0:
                return None
            args, kwargs = fx.node.map_arg((each.args, each.kwargs), self._values.__getitem__)
            if each.op == "call_method":
                found = getattr(args[0], str(each.target))(*args[1:], **kwargs)
            else:
                function: Any = each.target
                found = function(*args, **kwargs)
            if isinstance(value, Tensor) and found.dtype != value.dtype:
                return None  # autocast has a say in it
            self._values[each] = found
        return self._values[node]


Rule = Callable[[Elements, fx.Node, Indices], Value]


def is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _triangle(table: Tensor, row: Linear, column: Linear) -> Value | None:
    """The entry of a table of two values, one on the diagonal and on one of its sides."""
    inside = torch.ones_like(table, dtype=torch.bool)
    for seen, other, distance in (
        (inside.tril(), table[0, -1], row - column), (inside.triu(), table[-1, 0], column - row),
    ):  # fmt: skip
        if table.equal(torch.where(seen, table[0, 0], other)):
            ends = table[0, 0].item(), other.item()
            return combine(lambda yes, ends=ends: ends[0] if yes else ends[1], holds(distance))
    return None


def _is_fixed(node: fx.Node) -> bool:
    value = value_of(node)
    sizes = value.shape if isinstance(value, Tensor) else (value,)
    free = (torch.SymInt, torch.SymFloat, torch.SymBool)
    return not any(isinstance(each, free) for each in sizes)
