"""The pass pipeline: a pass that fails costs its own rewrite, never the model."""

from __future__ import annotations

from typing import Any

import accel
import pytest
import torch
from accel.passes import PadePass, Reason
from accel.passes.graph.nodes import copy_module


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
