"""No list of operators' names decides what a call shares, writes or draws: `facts` does.

Names may say which pattern a pass looks for. Every literal of names that could be the other thing
is listed below, with what it says.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import accel
import torch

ROOT = Path(accel.__file__).parent

# By module and by function or variable: what its names say.
ALLOWED = {
    "attention._written_out": "what stands between a softmax and the product with the values",
    "attention._swaps_last": "how keys are transposed; which dimensions, the arguments say",
    "attention._repeated": "how repeated key heads are merged, after an expand",
    "clock._BEFORE_SINE": "what a timestep goes through before the sine of its embedding",
    "clock._AFTER_SINE": "what the sine goes through before a layer",
    "contraction._source": "how a generated vector becomes a matrix",
    "handed._moved": "how keys and values may be rearranged; all else is refused by name",
    "handed.SAME": "what hands keys and values on as they are; all else is refused by name",
    "lookups.analysed": "what of the weights alone is worth computing ahead",
    "pairing._additive_sources": "what keeps a residual stream, and which of it keeps a window",
    "rows.POINTWISE": "what treats each element by itself, so that a row can be chosen before",
    "rules.RULES": "what each call makes at an index; each rule is tested against torch",
    "step._take_out_lists": "what may index with a list of numbers",
}
# Random, and named as part of a pattern: that it is turned off, or may draw, facts say.
ALLOWED_RANDOM = {"dropout"}


@cache
def operators() -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """The names of what writes in place, of what returns a view, and of what draws: from torch."""
    writes = {name for name in dir(torch.Tensor) if name[-1] == "_" and name[-2] != "_"}
    writes |= {name for name in dir(operator) if name[0] == "i" and hasattr(operator, name[1:])}
    views, draws = set(), set()
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, name = schema.name.partition("::")
        packet = getattr(torch.ops.aten, name, None) if namespace == "aten" else None
        if (
            packet is None
            or not schema.arguments
            or schema.arguments[0].type.kind() != "TensorType"
        ):
            continue
        results = [each.alias_info for each in schema.returns if each.alias_info is not None]
        if results and not any(each.is_write for each in results):
            views.add(name)
        overload = getattr(packet, schema.overload_name or "default", None)
        if torch.Tag.nondeterministic_seeded in getattr(overload, "tags", ()):
            draws.add(name)
    return frozenset({*writes, "setitem"}), frozenset(views), frozenset(draws)


def suspicious(tree: ast.Module) -> Iterator[tuple[str, set[str]]]:
    """(the function or variable that a literal stands in, its names of operators) of each that
    names something that writes, two that return views, or something that draws."""
    writes, views, draws = operators()
    for owner, literal in _literals(tree, ""):
        names = {_name(each) for each in literal} - {""}
        if len(names) > 1 and (names & writes or len(names & views) > 1 or names & draws):
            yield owner, names & (writes | views | draws)


def _literals(node: ast.AST, owner: str) -> Iterator[tuple[str, list[ast.expr]]]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        owner = node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign) and not owner:
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        owner = getattr(target, "id", "")
    if isinstance(node, ast.Set | ast.Tuple | ast.List):
        yield owner, node.elts
    elif isinstance(node, ast.Dict):
        yield owner, [each for each in node.keys if isinstance(each, ast.Constant)]
    for child in ast.iter_child_nodes(node):
        yield from _literals(child, owner)


def _name(element: ast.expr) -> str:
    """Of "view", torch.Tensor.view, torch.ops.aten.view and torch.ops.aten.view.default: view."""
    if isinstance(element, ast.Constant) and isinstance(element.value, str):
        return element.value
    parts = ast.unparse(element).split(".")
    if parts[0] not in ("torch", "operator", "aten", "Tensor") or parts[-1] == parts[0]:
        return ""
    return [*parts, ""][parts.index("aten") + 1] if "aten" in parts else parts[-1]


def test_no_list_of_names_says_what_a_call_does() -> None:
    found: dict[str, set[str]] = {}
    for path in [*(ROOT / "passes").rglob("*.py"), *(ROOT / "compiler").rglob("*.py")]:
        for owner, names in suspicious(ast.parse(path.read_text())):
            assert len(names & operators()[2]) < 2, (path, owner, names)
            found.setdefault(f"{path.stem}.{owner}", set()).update(names)
    assert found.keys() - ALLOWED.keys() == set()
    assert ALLOWED.keys() - found.keys() == set()  # each is still needed
    assert set().union(*found.values()) & operators()[2] <= ALLOWED_RANDOM


MADE_UP = """
WRITES = {"copy_", "fill"}
BACK = (operator.iadd, "isub")
def is_view(node):
    return node.target in frozenset([torch.ops.aten.view.default, torch.Tensor.ravel])
class Rows:
    views: tuple[str, ...] = ("diagonal", "unfold")
RANDOM = {"bernoulli": 1, "scale": 2}
drawn = name in ("uniform", "zeros")
"""
GOOD = """
NAMES = ("cat", "view", 1)
FIELDS = (found.values, found.indices)
__all__ = ["shift", "scale"]
ONE = ("narrow", torch.narrow)
SUMS = {"add", "sub", "mul"}
LAYERS = [torch.nn.functional.linear, torch.nn.Linear]
"""


def test_such_lists_are_found_however_they_are_written() -> None:
    assert list(suspicious(ast.parse(MADE_UP))) == [
        ("WRITES", {"copy_"}),
        ("BACK", {"iadd", "isub"}),
        ("is_view", {"view", "ravel"}),
        ("Rows", {"diagonal", "unfold"}),
        ("RANDOM", {"bernoulli"}),
        ("drawn", {"uniform"}),
    ]
    assert list(suspicious(ast.parse(GOOD))) == []
