"""`explain` and `stats` tell the truth, also where there is nothing to tell."""

from __future__ import annotations

import accel
import pytest
import torch
from accel import AccelError
from accel.passes import PASSES
from accel.tests.models import dit, euler, noise
from torch import nn

LABELS = torch.tensor([1, 2])
# Of `dit`, for two samples: three residuals of 16 tokens, and tensors like its output.
RESIDUALS, ANSWER = 3 * 2 * 16 * 32 * 4, 2 * 2 * 8 * 8 * 4


def explained(**options: object) -> accel.Report:
    timestep = torch.full((2,), 500.0)
    with torch.no_grad():
        return accel.explain(
            dit(), noise(), timestep=timestep, class_labels=LABELS, options=options
        )


def test_every_pass_has_an_entry() -> None:
    report = explained()
    assert list(report.passes) == [kind.name for kind in PASSES]
    assert report.fullgraph
    assert report.passes["pade"].matched == ("transformer_blocks (2)",)
    assert report.passes["pade"].details[0]["state_bytes"] == RESIDUALS + 2 * ANSWER
    text = str(report)
    assert "of 20 steps computes 8" in text
    assert "of 4 steps 4: nothing to gain there" in text


def test_a_pass_that_is_off_says_so() -> None:
    report = explained(pade=False, outline=False)
    for name in ("pade", "outline"):
        assert report.passes[name].skipped[0].reason.value == "turned off"


def test_report_of_the_compiled_graphs() -> None:
    fast = torch.compile(dit(), backend="accel", options={"lowering": "eager"})
    with pytest.raises(AccelError, match="call it once"):
        accel.report_of(fast)
    euler(fast, noise(), LABELS, steps=2)
    assert accel.report_of(fast).passes["pade"].matched


def test_stats_before_the_first_call_and_without_accel() -> None:
    model = torch.compile(dit(), backend="eager")
    euler(model, noise(), LABELS, steps=2)
    assert accel.stats(model).full_steps == 0
    assert accel.stats(nn.Linear(1, 1)).recompiles == 0
    with pytest.raises(AccelError, match=r"torch\.nn\.Module"):
        accel.stats(lambda x: x)


def test_state_is_counted_while_a_run_is_open() -> None:
    fast = torch.compile(dit(), backend="accel", options={"lowering": "eager"})
    euler(fast, noise(), LABELS, times=[1 - i / 20 for i in range(5)])
    # A run may go on from each of its steps: three computed ones with two answers, two with a sum.
    held = RESIDUALS + (3 * 2 + 2) * ANSWER
    assert accel.stats(fast).state_bytes == held
    with accel.trajectory(fast, steps=5):
        euler(fast, noise(), LABELS, steps=5)
    assert accel.stats(fast).state_bytes == held


def test_graph_breaks_are_not_recompilations() -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    model = Breaks()
    fast = torch.compile(model, backend="accel", options={"lowering": "eager"})
    with torch.no_grad():
        fast(torch.ones(2, 4))
        assert accel.stats(fast).recompiles == 0
        assert "2 graphs" in str(accel.report_of(fast))
        explained = accel.explain(model, torch.ones(2, 4))
        assert "2 graphs" in str(explained)
        assert "graph_break" in explained.broken
        assert explained.broken in str(explained)


def test_another_batch_size_is_a_recompilation_of_one_graph() -> None:
    fast = torch.compile(dit(), backend="accel", options={"lowering": "eager"})
    for batch in (2, 3):
        euler(fast, noise(batch), torch.arange(batch), steps=2)
    assert accel.stats(fast).recompiles == 1
    assert "captured whole (fullgraph=True), compiled 2 times" in str(accel.report_of(fast))


def test_models_without_parameters_are_told_apart() -> None:
    """Graphs are found by a model's parameters."""
    compiled = torch.compile(torch.nn.ReLU(), backend="accel", options={"lowering": "eager"})
    compiled(torch.ones(3))
    with pytest.raises(accel.AccelError, match="no parameters, by which its graphs are found"):
        accel.report_of(compiled)
