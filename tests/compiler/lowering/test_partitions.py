"""Graphs in parts: what TensorRT would be handed, with the choice in torch.

torch_tensorrt can't be installed where this is tested. So the parts run as they are here, and what
is tested is that they are the whole; what TensorRT makes of them is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accel
import pytest
import torch
from accel.compiler.lowering import table as lowering
from accel.compiler.lowering.partitions import Partition
from accel.tests.models import dit, euler, noise, relative
from accel.tests.zoo import ENTRIES
from accel.tests.zoo.parts import next_inputs, step_inputs, tensors
from torch import nn

LABELS = torch.tensor([1, 2])
FULL_AND_PREDICTED = {"schedule": [0, 1, 2, 9], "max_error": 1e9}


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[Partition]:
    """The parts that were compiled, by a stand-in for torch_tensorrt that runs them as they are."""
    found: list[Partition] = []

    def compile_part(part: Partition) -> Callable[..., Any]:
        found.append(part)
        return part.module.forward

    monkeypatch.setattr(lowering, "optional", lambda module, extra: None)
    monkeypatch.setattr(lowering, "_tensorrt_part", compile_part)
    return found


def targets(part: Partition) -> set[Any]:
    return {node.target for node in part.module.graph.nodes}


@torch.no_grad()
def test_a_run_in_parts(parts: list[Partition]) -> None:
    whole = torch.compile(dit(), backend="accel", options={"lowering": "eager"})
    cut = torch.compile(dit(), backend="accel", options={"lowering": "tensorrt"})
    expected = euler(whole, noise(), LABELS)
    for one, other in zip(euler(cut, noise(), LABELS), expected, strict=True):
        assert relative(one, other) < 1e-6
    assert accel.stats(cut).predicted_steps == accel.stats(whole).predicted_steps > 0
    assert [part.name for part in parts] == ["before", "computed", "predicted", "after"]
    higher_order = torch.ops.higher_order
    for part in parts:
        assert not targets(part) & {higher_order.cond, higher_order.invoke_subgraph}
        assert len(part.examples()) > 0
    outline = accel.report_of(cut).passes["outline"]
    assert "no converter" in str(outline.skipped[0])


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "AceStepTransformer1DModel"])
@torch.no_grad()
def test_other_models_and_free_sizes(name: str, parts: list[Partition]) -> None:
    entry = ENTRIES[name]
    options = {"lowering": "tensorrt", "pade": FULL_AND_PREDICTED}
    cut = torch.compile(entry.build(), backend="accel", dynamic=True, options=options)
    whole = torch.compile(
        entry.build(), backend="accel", dynamic=True, options={**options, "lowering": "eager"}
    )
    inputs = step_inputs(entry, 0)
    for step in range(4):
        outputs = whole(**inputs)
        pairs = zip(tensors(cut(**inputs)), tensors(outputs), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one, other)
        inputs = next_inputs(entry, inputs, outputs, step + 1)
    assert accel.stats(cut).predicted_steps == 1
    assert len(parts) == 4


@torch.no_grad()
def test_a_graph_without_a_branch_is_one_part(parts: list[Partition]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    cut = torch.compile(model, backend="accel", options={"lowering": "tensorrt"})
    value = torch.randn(2, 4)
    torch.testing.assert_close(cut(value), model(value))
    assert [part.name for part in parts] == ["whole"]


def test_training_is_refused(parts: list[Partition]) -> None:
    cut = torch.compile(nn.Linear(4, 4), backend="accel", options={"lowering": "tensorrt"})
    with pytest.raises(Exception, match="'tensorrt' is for inference"):
        cut(torch.randn(2, 4))
    assert parts == []


@torch.no_grad()
def test_the_missing_package_is_named() -> None:
    cut = torch.compile(dit(2), backend="accel", options={"lowering": "tensorrt"})
    with pytest.raises(Exception, match=r"pip install 'accel-compiler\[tensorrt\]'"):
        cut(noise(), timestep=torch.ones(2), class_labels=LABELS)


@torch.no_grad()
def test_explain_shows_the_parts() -> None:
    inputs = {"timestep": torch.ones(2), "class_labels": LABELS}
    report = accel.explain(dit(2), noise(), options={"lowering": "tensorrt"}, **inputs)
    text = str(report)
    assert "for TensorRT: before (" in text
    assert ", computed (" in text
    assert ", predicted (" in text
