"""Tensor sizes as text: how a size that depends on the inputs is kept outside a graph."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...kernels.errors import EngineError

__all__ = ["Size", "evaluate", "size_of", "text_of"]

Size = int | str  # a number, or an expression of symbols such as "(s0 // 2)*(s1 // 2)"

_OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_SIGNS: dict[type, Callable[[int], int]] = {
    ast.USub: operator.neg,
    ast.Not: lambda value: int(not value),
}
_COMPARISONS: dict[type, Callable[[int, int], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_FUNCTIONS: dict[str, Callable[..., int]] = {"max": max, "min": min}


def size_of(size: int | str | torch.SymInt) -> Size:
    """A size of a captured tensor as a number or as text."""
    if not isinstance(size, torch.SymInt):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_number else text_of(expression)


def text_of(expression: Any) -> str:
    """A sympy expression as Python would write it."""
    from torch.utils._sympy.printers import PythonPrinter

    return str(PythonPrinter().doprint(expression))


def evaluate(size: Size, symbols: Callable[[str], int] | Mapping[str, int]) -> int:
    """A size, or a condition on sizes (then 0 or 1), given the symbols in it.

    The text may come from a file: only whole numbers, + - * // %, `min`, `max`, comparisons and
    `and`, `or`, `not` are taken; anything else is an EngineError.
    """
    if isinstance(size, int):
        return size
    look_up = symbols.__getitem__ if isinstance(symbols, Mapping) else symbols
    try:
        if size.isidentifier():
            return look_up(size)
        return _value(ast.parse(size, mode="eval").body, look_up)
    except _BROKEN as error:
        raise EngineError(f"{size!r} is no expression of sizes: {error}") from error


_BROKEN = (ArithmeticError, KeyError, MemoryError, RecursionError, SyntaxError, ValueError)


def _value(node: Any, look_up: Callable[[str], int]) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        return look_up(node.id)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _SIGNS:
        return _SIGNS[type(node.op)](_value(node.operand, look_up))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left, look_up), _value(node.right, look_up)
        return _OPERATORS[type(node.op)](left, right)
    if isinstance(node, ast.BoolOp):
        join = all if isinstance(node.op, ast.And) else any
        return int(join(_value(each, look_up) for each in node.values))
    if isinstance(node, ast.Compare) and all(type(each) in _COMPARISONS for each in node.ops):
        values = [_value(each, look_up) for each in (node.left, *node.comparators)]
        pairs = zip(node.ops, values, values[1:], strict=False)
        return int(all(_COMPARISONS[type(each)](left, right) for each, left, right in pairs))
    named = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords
    if named and node.func.id in _FUNCTIONS and node.args:
        return _FUNCTIONS[node.func.id](*(_value(each, look_up) for each in node.args))
    raise SyntaxError(f"{ast.dump(node)[:80]} is not allowed")
