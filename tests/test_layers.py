"""Imports go downward and in no circle: examples -> accel -> compiler -> passes -> kernels."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import accel
import pytest

# Each may import itself and those before it; "" is the root's own __init__.py.
LAYERS = ("kernels", "passes", "compiler", "", "examples", "tests")
# passes/graph is what the passes stand on: of passes/ it knows itself, and the type of a program.
GRAPH, GRAPH_KNOWS = "accel.passes.graph", "accel.passes.base"


@dataclass(frozen=True)
class Arrow:
    """A module imports another. eager: when it is imported itself, not when a function runs."""

    importer: str
    imported: str
    eager: bool
    line: int

    def __str__(self) -> str:
        return f"{self.importer}, line {self.line}, imports {self.imported}"


def arrows_of(root: Path) -> list[Arrow]:
    """All imports within a tree whose root is the package accel, those for type checkers too."""
    files = {"accel": root / "__init__.py"}
    for path in sorted(
        each for layer in filter(None, LAYERS) for each in root.glob(f"{layer}/**/*.py")
    ):
        parts = path.relative_to(root).with_suffix("").parts
        files[".".join(("accel", *parts)).removesuffix(".__init__")] = path
    return [each for name, path in files.items() for each in _arrows(name, path, set(files))]


def _arrows(name: str, path: Path, known: set[str]) -> Iterator[Arrow]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    functions = (each for each in ast.walk(tree)
                 if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef))  # fmt: skip
    late = {inner for each in functions for inner in ast.walk(each)}
    for node in ast.walk(tree):
        targets = []
        if isinstance(node, ast.Import):
            targets = [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            inner = [f"{module}.{each.name}" for each in node.names]
            targets = [each if each in known else module for each in inner]
        for target in targets:
            if target.partition(".")[0] == "accel":
                assert target in known, f"{path}, line {node.lineno}: there is no {target}"
                yield Arrow(name, target, node not in late, node.lineno)


def _layer(module: str) -> int:
    return LAYERS.index(module.split(".")[1] if "." in module else "")


def is_upward(arrow: Arrow) -> bool:
    if _layer(arrow.imported) > _layer(arrow.importer):
        return True
    within = f"{arrow.importer}.".startswith(f"{GRAPH}.")
    if not within or _layer(arrow.imported) < LAYERS.index("passes"):
        return False
    return not f"{arrow.imported}.".startswith(f"{GRAPH}.") and arrow.imported != GRAPH_KNOWS


def circle(arrows: list[Arrow]) -> list[str]:
    """The modules of one circle of eager imports; empty where there is none."""
    graph: dict[str, set[str]] = {}
    for each in arrows:
        if each.eager:
            graph.setdefault(each.importer, set()).add(each.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.fixture(scope="module")
def arrows() -> list[Arrow]:
    return arrows_of(Path(accel.__file__).parent)


def test_no_import_goes_upward(arrows: list[Arrow]) -> None:
    assert [str(each) for each in arrows if is_upward(each)] == []


def test_no_imports_go_in_a_circle(arrows: list[Arrow]) -> None:
    assert circle(arrows) == []


def test_the_imports_are_seen(arrows: list[Arrow]) -> None:
    """Of every kind one, so that the two tests above can't pass by seeing nothing."""
    seen = {(each.importer, each.imported, each.eager) for each in arrows}
    assert {
        ("accel", "accel.compiler.export", True),
        ("accel", "accel.compiler.extras", False),
        ("accel.compiler.cli", "accel.compiler.report", False),
        ("accel.compiler.cli", "accel.kernels.errors", True),
        ("accel.passes.graph.verify", "accel.passes.base", True),
        ("accel.examples.commands", "accel.examples.fashion.demo", False),
        ("accel.tests.test_layers", "accel", True),
    } <= seen


MADE_UP = {
    "kernels/bad.py": "from ..passes import base",
    "kernels/lazy.py": "def f():\n    from ..compiler.pipeline import run",
    "passes/base.py": "from .. import __version__",
    "passes/room.py": "if TYPE_CHECKING:\n    from .graph import x",
    "passes/graph/__init__.py": "from ..base import y\nfrom ..room import z",
    "compiler/pipeline.py": "import accel.examples.demo\nfrom accel.tests import models",
    "compiler/one.py": "from . import two",
    "compiler/two.py": "class A:\n    from .three import x",
    "compiler/three.py": "def f():\n    from .one import x",
    "examples/demo.py": "from ..compiler import one\nimport torch",
    "tests/models.py": "from accel.examples import demo",
}


def test_wrong_imports_are_found(tmp_path: Path) -> None:
    for layer in LAYERS:
        (tmp_path / layer).mkdir(exist_ok=True)
        (tmp_path / layer / "__init__.py").touch()
    (tmp_path / "passes" / "graph").mkdir()
    for name, text in MADE_UP.items():
        (tmp_path / name).write_text(text)
    arrows = arrows_of(tmp_path)
    upward = {(each.importer, each.imported) for each in arrows if is_upward(each)}
    assert upward == {
        ("accel.kernels.bad", "accel.passes.base"),
        ("accel.kernels.lazy", "accel.compiler.pipeline"),
        ("accel.passes.base", "accel"),
        ("accel.passes.graph", "accel.passes.room"),
        ("accel.compiler.pipeline", "accel.examples.demo"),
        ("accel.compiler.pipeline", "accel.tests.models"),
    }
    assert set(circle(arrows)) == {"accel.passes.graph", "accel.passes.room"}
    rest = [each for each in arrows if each.importer != "accel.passes.room"]
    assert circle(rest) == []  # the third of one, two and three is late
    closing = Arrow("accel.compiler.three", "accel.compiler.one", eager=True, line=1)
    assert len(circle([*rest, closing])) == 4
