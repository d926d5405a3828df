"""What Inductor makes of rewritten graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accel
import pytest
import torch
from accel.compiler import inductor
from accel.compiler.inductor import inductor_settings
from accel.compiler.models.solid.behaviour import BehaviourEncoder
from accel.examples.recommender.backbones import BACKBONES
from accel.passes.codebook.single_query import are_short
from accel.tests.models import dit, noise
from accel.tests.passes.test_blocks import Mix, Timed
from accel.tests.zoo import ENTRIES
from accel.tests.zoo.parts import next_inputs, step_inputs, tensors
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache, run_and_get_code


@torch.no_grad()
def test_operands_whose_layout_inductor_chooses() -> None:
    """AceStep hands its blocks a transposed convolution that was made contiguous."""
    entry = ENTRIES["AceStepTransformer1DModel"]
    model = entry.build()
    options = {"pade": {"schedule": [0, 1, 2, 9], "max_error": 1e9}}
    fast = torch.compile(model, backend="accel", fullgraph=True, options=options)
    plain = torch.compile(entry.build(), backend="accel", options={**options, "lowering": "eager"})
    inputs = step_inputs(entry, 0)
    for step in range(4):
        outputs = plain(**inputs)
        expected = outputs if step == 3 else model(**inputs)
        for one, other in zip(tensors(fast(**inputs)), tensors(expected), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        inputs = next_inputs(entry, inputs, outputs, step + 1)
    assert accel.stats(fast).predicted_steps == 1


class Pair(nn.Module):
    """A block of two streams."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = Mix(), Mix()

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.text(text), self.image(image + text.mean(0))


class Packed(Timed):
    """Its streams begin as slices of one tensor, as in models that pack sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Pair() for _ in range(3))

    def body(self, x: Tensor, time: Tensor) -> Tensor:
        text, image = (x + time)[0].split([2, 3])
        for block in self.blocks:
            text, image = block(text, image)
        return torch.cat([text, image])


@torch.no_grad()
def test_operands_that_are_slices_of_one_tensor() -> None:
    torch.manual_seed(0)
    model, x = Packed(), torch.randn(1, 5, 8)
    fast = torch.compile(model, backend="accel", fullgraph=True)
    for time in (900.0, 800.0):
        inputs = x, torch.tensor([time])
        torch.testing.assert_close(fast(*inputs), model(*inputs))
    pade = accel.report_of(fast).passes["pade"]
    assert pade.details[0]["streams"] == 2


@torch.no_grad()
def test_a_pass_of_the_users_still_runs() -> None:
    seen = []
    compiled = torch.compile(dit(2), backend="accel")
    with torch._inductor.config.patch(post_grad_custom_post_pass=seen.append):
        compiled(noise(), timestep=torch.ones(2), class_labels=torch.tensor([1, 2]))
    assert seen


@pytest.mark.parametrize("pade", [{"schedule": "full"}, False])
@torch.no_grad()
def test_numbers_that_dynamo_leaves_free(pade: object) -> None:
    """With dynamic=True a model's epsilons and scales are inputs; blocks are found all the same."""
    entry = ENTRIES["AceStepTransformer1DModel"]
    model = entry.build()
    fast = torch.compile(
        model, backend="accel", fullgraph=True, dynamic=True,
        options={"pade": pade, "lowering": "eager"},
    )  # fmt: skip
    inputs = step_inputs(entry, 0)
    for one, other in zip(tensors(fast(**inputs)), tensors(model(**inputs)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    report = accel.report_of(fast)
    assert report.passes["outline"].matched
    assert bool(report.passes["pade"].matched) == bool(pade)


@torch.no_grad()
def test_everything_that_dynamo_leaves_free_under_inductor() -> None:
    """Whole graphs with free numbers: Inductor has to see where Dynamo's inputs come from."""
    model = dit(2)
    fast = torch.compile(model, backend="accel", fullgraph=True, dynamic=True)
    for batch in (2, 3):
        inputs: dict[str, Any] = {
            "timestep": torch.full((batch,), 900.0), "class_labels": torch.arange(batch)
        }  # fmt: skip
        got = fast(noise(batch), **inputs).sample
        torch.testing.assert_close(got, model(noise(batch), **inputs).sample, rtol=1e-4, atol=1e-5)
    assert accel.report_of(fast).passes["pade"].matched


def test_cached_code_does_not_outlive_the_operators_and_passes() -> None:
    """Inductor keeps compiled graphs on disk; the key holds the sources of all that makes them."""
    settle = inductor_settings()["post_grad_custom_post_pass"]
    assert settle.uuid() == settle.uuid()
    hashed = {Path(each).resolve() for each in inductor._sources()}
    root = Path(accel.__file__).parent.resolve()
    for folder in ("kernels", "passes", "compiler"):
        assert set((root / folder).rglob("*.py")) <= hashed
        assert set((root / folder).rglob("*.cpp")) <= hashed


class Looked(nn.Module):
    """Rows of a table, computed on, through blocks that are large enough to be shared."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.table, self.project = nn.Embedding(9, 8), nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Residual() for _ in range(blocks))
        self.gru = BehaviourEncoder(8)

    def forward(self, ids: Tensor) -> Tensor:
        states = self.project(self.table(ids)).tanh()
        for block in self.blocks:
            states = block(states)
        count = torch.full((ids.shape[0],), ids.shape[1])
        read: Tensor = self.gru(self.table(ids), count)
        return states[:, -1] + read


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, states: Tensor) -> Tensor:
        for layer in self.layers:
            states = states + layer(states).tanh()
        return states


@pytest.mark.parametrize("blocks", [0, 2])
@torch.no_grad()
def test_graphs_with_tables(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Called from C++, but where blocks are shared; for two models, of any batch."""
    chosen = []

    def noted(module: Any) -> bool:
        chosen.append(are_short(module))
        return chosen[-1]

    monkeypatch.setattr("accel.compiler.lowering.table.are_short", noted)
    torch.manual_seed(0)
    models = Looked(blocks), Looked(blocks)
    runs = [
        torch.compile(each, backend="accel", fullgraph=True, options={"codebook": True})
        for each in models
    ]
    for rows in (1, 3, 40):
        ids = torch.randint(9, (rows, 5))
        for run, model in zip(runs, models, strict=True):
            torch.testing.assert_close(run(ids), model(ids))
    assert chosen == [not blocks] * len(chosen)
    assert chosen
    for run in runs:
        found = accel.report_of(run).passes
        assert found["codebook"].matched
        assert bool(found["outline"].matched) == bool(blocks)
    models[0].project.weight.mul_(2)
    torch.testing.assert_close(runs[0](ids), models[0](ids))


@pytest.mark.parametrize("users", [1, 3])
@torch.no_grad()
def test_products_with_one_row_become_loops(users: int) -> None:
    """Inductor has had a setting for it that did nothing."""
    model = BACKBONES["GRU4Rec"](30).eval()
    given = torch.randint(1, 30, (users, 5)), torch.randint(1, 30, (users, 4))
    run = torch.compile(
        model, backend="accel", fullgraph=True, dynamic=False, options={"codebook": True}
    )
    with fresh_cache():
        scores, (code,) = run_and_get_code(run, *given)
    torch.testing.assert_close(scores, model(*given))
    assert ("addmm_out(" in code) == (users > 1)


@pytest.mark.parametrize(("users", "opened"), [(1, 1), (3, 0)])
@torch.no_grad()
def test_attention_of_one_user(users: int, opened: int) -> None:
    """Of the last item alone; padding is not seen."""
    model = BACKBONES["SASRec"](30).eval()
    history = torch.tensor([[0, 0, 3, 7, 9], [1, 2, 3, 4, 5], [0, 0, 0, 0, 0]])[:users]
    candidates = torch.arange(1, 9).expand(users, -1)
    run = torch.compile(
        model, backend="accel", fullgraph=True, dynamic=False, options={"codebook": True}
    )
    for given in (history, history.flip(1)):
        torch.testing.assert_close(run(given, candidates), model(given, candidates))
    assert len(accel.report_of(run).passes["single_query"].matched) == opened
