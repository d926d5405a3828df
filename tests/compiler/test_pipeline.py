"""The pass pipeline: a pass that fails costs its own rewrite, never the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accel
import pytest
import torch
from accel import Options
from accel.compiler.pipeline import rewrite
from accel.passes import Feature, OutlinePass, PadePass, PassResult, Program, Reason
from accel.passes.graph.nodes import copy_module
from accel.tests.models import dit, noise
from torch import fx, nn


class Raises(PadePass):
    """A pass that fails in the middle of its rewrite."""

    def run(self, program: Any) -> Any:
        module, _ = copy_module(program.module)
        for node in module.graph.nodes:
            node.target = "spoilt"
        raise IndexError("tuple index out of range")


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PadePass, "run", Raises.run)


def test_whatever_a_pass_raises_the_model_runs_as_without_it(
    failing: None, caplog: pytest.LogCaptureFixture
) -> None:
    model = torch.nn.Linear(4, 4)
    compiled = torch.compile(model, backend="accel", options={"lowering": "eager"})
    given = torch.randn(2, 4)
    with torch.no_grad():
        assert torch.equal(compiled(given), model(given))
    (skip,) = accel.report_of(compiled).passes["pade"].skipped
    assert skip.reason is Reason.RAISED
    assert "IndexError: tuple index out of range" in skip.detail
    assert any("IndexError" in record.getMessage() for record in caplog.records)


def test_with_verify_an_error_inside_a_pass_is_raised(failing: None) -> None:
    options = {"lowering": "eager", "verify": True}
    compiled = torch.compile(torch.nn.Linear(4, 4), backend="accel", options=options)
    with pytest.raises(Exception, match="tuple index out of range"), torch.no_grad():
        compiled(torch.randn(2, 4))


def test_graphs_are_dumped_before_and_after_each_pass(tmp_path: Path) -> None:
    inputs = {"timestep": torch.full((2,), 500.0), "class_labels": torch.tensor([1, 2])}
    with torch.no_grad():
        report = accel.explain(dit(), noise(), **inputs, options={"dump": tmp_path / "graphs"})
    written = sorted((tmp_path / "graphs").iterdir())
    stages = [path.stem.partition("-")[2] for path in written]
    assert stages == ["0-captured", "1-pade", "2-outline"]
    assert "cond(" not in written[0].read_text()
    assert "cond(" in written[1].read_text()
    assert "invoke_subgraph" in written[2].read_text()
    assert all(each.seconds > 0 for each in report.passes.values() if each.matched)


def test_a_directory_that_can_t_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception, match="graphs can't be dumped"), torch.no_grad():
        accel.explain(nn.Linear(4, 4), torch.randn(2, 4), options={"dump": tmp_path / "file"})


def test_a_feature_that_the_target_can_t_hold_leaves_the_pass_out() -> None:
    graphs: list[fx.GraphModule] = []

    def collect(module: fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(module)
        return module.forward

    inputs = {"timestep": torch.full((2,), 500.0), "class_labels": torch.tensor([1, 2])}
    with torch.no_grad():
        torch.compile(dit(), backend=collect, fullgraph=True)(noise(), **inputs)
        program, results = rewrite(graphs[0], Options(), {Feature.BRANCH: "it has no If"})
    (pade,) = [each for each in results if each.name == "pade"]
    assert [str(each) for each in pade.skipped] == ["the file format can't hold it: it has no If"]
    assert program.features == {Feature.SHARED_SUBGRAPHS}
    assert not program.added


def test_a_rewrite_leaves_the_graph_that_it_was_given(tmp_path: Path) -> None:
    """Branches of an earlier pass included: outlining edits copies of them."""
    texts: list[str] = []

    class Watched(OutlinePass):
        def run(self, program: Program) -> tuple[Program, PassResult]:
            before = program.module.print_readable(print_output=False)
            found = OutlinePass().run(program)
            texts.extend([before, program.module.print_readable(print_output=False)])
            return found

    options = Options(outline=Watched(), verify=True)
    inputs = {"timestep": torch.full((2,), 500.0), "class_labels": torch.tensor([1, 2])}
    with torch.no_grad():
        assert accel.explain(dit(), noise(), options=options, **inputs).passes["outline"].matched
    assert texts[0] == texts[1]
    assert "cond(" in texts[0]
