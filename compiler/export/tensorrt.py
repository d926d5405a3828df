"""An ONNX file against TensorRT's published operator support. Nothing here runs TensorRT.

The table (`tensorrt_support.json`) is that of onnx-tensorrt's documentation; it names its source
and version. A file without findings is one that TensorRT's parser says it takes, no more: whether
an engine builds and is fast, only a machine with TensorRT can tell. There:

    trtexec --onnx=model.onnx --saveEngine=model.plan --minShapes=... --optShapes=...
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...kernels.errors import EngineError, first_line
from ..extras import optional

__all__ = ["Finding", "check_tensorrt", "published_support"]

TABLE = Path(__file__).parent / "tensorrt_support.json"
# The table's names of ONNX element types; DOUBLE is narrowed to FP32 by the parser.
TYPES = {"FLOAT": "FP32", "FLOAT16": "FP16", "BFLOAT16": "BF16", "INT32": "INT32",
         "INT64": "INT64", "UINT8": "UINT8", "BOOL": "BOOL", "DOUBLE": "FP32"}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One thing that stands against a node, or that its user should read.

    kind: "unsupported" (the table says no), "type" (an input's type is not in the operator's row),
    "if" (a rule for conditionals), "unknown" (no row), or "restriction" (supported, with a
    condition that this check does not decide).
    """

    kind: str
    operator: str
    node: str
    detail: str


def published_support() -> dict[str, Any]:
    """The table: source, version, and for each operator support, types and restrictions."""
    table: dict[str, Any] = json.loads(TABLE.read_text())
    return table


def check_tensorrt(path: str | Path) -> list[Finding]:
    """Check every node of an ONNX file, those in branches too.

    Raises EngineError for a file that is none.
    """
    onnx = optional("onnx", "onnx")
    try:
        model = onnx.load(path, load_external_data=False)
        model = onnx.shape_inference.infer_shapes(model)
    except Exception as error:  # protobuf's and onnx's errors share no class
        raise EngineError(f"{path}: not an ONNX file: {first_line(error)}") from error
    element = onnx.TensorProto.DataType
    return list(_check_graph(model.graph, {}, {}, published_support()["operators"], element))


def _types(graph: Any, outer: Mapping[str, Any]) -> dict[str, Any]:
    known = dict(outer)
    for value in (*graph.input, *graph.value_info, *graph.output):
        known[value.name] = value.type.tensor_type
    return known


def _meets(node: Any, constants: Collection[str]) -> bool:
    """Whether a node is seen to meet its row's restriction."""
    if node.op_type in ("Unsqueeze", "Squeeze", "ReduceSum"):
        return len(node.input) > 1 and node.input[1] in constants  # the axes
    if node.op_type == "LayerNormalization":
        return len(node.output) == 1
    return node.op_type == "If"  # has rules of its own


def _check_graph(
    graph: Any,
    outer: Mapping[str, Any],
    outer_weights: Mapping[str, int],
    table: Mapping[str, Any],
    element: Any,
) -> Iterator[Finding]:
    known = _types(graph, outer)
    weights = {**outer_weights, **{each.name: each.data_type for each in graph.initializer}}
    for node in graph.node:
        row = table.get(node.op_type)
        if row is None:
            yield Finding("unknown", node.op_type, node.name, "not in the published table")
        elif not row["supported"]:
            yield Finding("unsupported", node.op_type, node.name, row["restrictions"])
        else:
            if row["restrictions"] and not _meets(node, weights):
                yield Finding("restriction", node.op_type, node.name, row["restrictions"])
            kinds = {n: known[n].elem_type if n in known else weights.get(n, 0) for n in node.input}
            yield from _check_types(node, kinds, row["types"], element)
        if node.op_type == "If":
            yield from _check_if(node, known, element)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _check_graph(attribute.g, known, weights, table, element)


def _check_types(
    node: Any, kinds: Mapping[str, int], listed: Sequence[str], element: Any
) -> Iterator[Finding]:
    """kinds: the element type of each input, 0 where the file does not state it."""
    for name, number in kinds.items():
        kind = TYPES.get(element.Name(number)) if number else None
        # Shapes, axes and indices are whole numbers whatever the operator computes in.
        index = kind in ("INT32", "INT64", "BOOL") and name != node.input[0]
        if kind is not None and kind not in listed and not index and node.op_type != "If":
            detail = f"{name} is {kind}; the table lists {', '.join(listed)}"
            yield Finding("type", node.op_type, node.name, detail)


def _check_if(node: Any, known: Mapping[str, Any], element: Any) -> Iterator[Finding]:
    """The rules for conditionals: condition, number, type, rank and names of outputs."""

    def finding(detail: str) -> Finding:
        return Finding("if", "If", node.name, detail)

    condition = known.get(node.input[0])
    if condition is None or element.Name(condition.elem_type) != "BOOL":
        yield finding(f"the condition {node.input[0]} is not known to be BOOL")
    elif len(condition.shape.dim) > 0:
        yield finding(f"the condition {node.input[0]} is not a single value")
    branches = {attribute.name: attribute.g for attribute in node.attribute}
    then, other = branches["then_branch"].output, branches["else_branch"].output
    if len(then) != len(other):
        yield finding(f"the branches return {len(then)} and {len(other)} values")
    for one, two in zip(then, other, strict=False):
        if one.name == two.name:
            yield finding(f"both branches name an output {one.name}")
        left, right = one.type.tensor_type, two.type.tensor_type
        if left.elem_type != right.elem_type:
            yield finding(f"{one.name} and {two.name} differ in type")
        if left.HasField("shape") and right.HasField("shape"):
            if len(left.shape.dim) != len(right.shape.dim):
                yield finding(f"{one.name} and {two.name} differ in rank")
        else:
            yield finding(f"the rank of {one.name} or {two.name} is not stated in the file")
