"""The check against TensorRT's table finds what it should, and nothing in an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accel import EngineError
from accel.compiler.export.tensorrt import check_tensorrt, published_support
from onnx import TensorProto, helper, save

from .conftest import EngineFile

FLOAT = TensorProto.FLOAT


def test_an_engine_is_clean(engine_file: EngineFile) -> None:
    assert check_tensorrt(engine_file("onnx")) == []


def test_the_table_names_its_source() -> None:
    table = published_support()
    assert table["source"].startswith("onnx/onnx-tensorrt docs/operators.md @ ")
    assert table["version"] == "10.15"
    assert len(table["operators"]) == 200


def test_another_file(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"hello")
    with pytest.raises(EngineError, match="not an ONNX file"):
        check_tensorrt(tmp_path / "a.onnx")


def saved(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any]) -> Path:
    graph = helper.make_graph(nodes, "graph", inputs, outputs)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)
    return path


def tensor(name: str, kind: int = FLOAT, shape: tuple[int, ...] = (4,)) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


@pytest.mark.parametrize(
    ("operator", "kind", "expected"),
    [
        ("Unique", FLOAT, "unsupported"),
        ("NoSuchOperator", FLOAT, "unknown"),
        ("Exp", TensorProto.INT64, "type"),
    ],
)
def test_single_nodes(operator: str, kind: int, expected: str, tmp_path: Path) -> None:
    node = helper.make_node(operator, ["x"], ["y"], name="here")
    path = saved(tmp_path / "a.onnx", [node], [tensor("x", kind)], [tensor("y", kind)])
    (finding,) = check_tensorrt(path)
    assert (finding.kind, finding.operator, finding.node) == (expected, operator, "here")


def test_axes_that_are_no_constant(tmp_path: Path) -> None:
    node = helper.make_node("Unsqueeze", ["x", "axes"], ["y"])
    axes = tensor("axes", TensorProto.INT64, (1,))
    path = saved(tmp_path / "a.onnx", [node], [tensor("x"), axes], [tensor("y", FLOAT, (4, 1))])
    assert [finding.kind for finding in check_tensorrt(path)] == ["restriction"]


@pytest.mark.parametrize(
    ("condition", "then", "other", "expected"),
    [
        (tensor("c", TensorProto.BOOL, ()), tensor("a"), tensor("b"), []),
        (tensor("c", TensorProto.BOOL, (2,)), tensor("a"), tensor("b"), ["single value"]),
        (tensor("c", TensorProto.INT64, ()), tensor("a"), tensor("b"), ["known to be BOOL"]),
        (tensor("c", TensorProto.BOOL, ()), tensor("a"), tensor("b", FLOAT, (4, 1)),
         ["differ in rank"]),
        (tensor("c", TensorProto.BOOL, ()), tensor("a"), tensor("b", TensorProto.INT64),
         ["differ in type"]),
        (tensor("c", TensorProto.BOOL, ()), tensor("a"), tensor("a"), ["both branches name"]),
    ],
)  # fmt: skip
def test_conditionals(
    condition: Any, then: Any, other: Any, expected: list[str], tmp_path: Path
) -> None:
    def branch(output: Any) -> Any:
        node = helper.make_node("Identity", ["x"], [output.name])
        return helper.make_graph([node], "branch", [], [output])

    node = helper.make_node("If", ["c"], ["y"], then_branch=branch(then), else_branch=branch(other))
    graph = helper.make_graph([node], "graph", [condition, tensor("x")], [tensor("y")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    save(model, tmp_path / "a.onnx")
    details = [each.detail for each in check_tensorrt(tmp_path / "a.onnx") if each.kind == "if"]
    assert len(details) == len(expected)
    for detail, part in zip(details, expected, strict=True):
        assert part in detail
