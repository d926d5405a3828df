"""Blocks that share a subgraph: which do, and that Inductor computes the same with them."""

from __future__ import annotations

import accel
import pytest
import torch
from torch import Tensor, nn

from .test_blocks import Mix, Timed, report


@pytest.fixture
def however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accel.passes.outline.FEWEST", 1)


@pytest.mark.usefixtures("however_small")
@pytest.mark.parametrize("count", [2, 5])
def test_outline_replaces_every_block(count: int) -> None:
    found = report(Timed(count)).passes["outline"]
    assert found.matched == (f"blocks ({count} blocks)",)
    assert found.details[0] == {"calls": count, "subgraphs": 1}


@pytest.mark.usefixtures("however_small")
def test_outline_leaves_blocks_that_differ() -> None:
    class Scaled(Mix):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = scale

        def forward(self, x: Tensor) -> Tensor:
            return x + self.linear(x) * self.scale

    model = Timed()
    model.blocks = nn.ModuleList([Scaled(0.1), Scaled(0.2), Scaled(0.3)])
    found = report(model).passes["outline"]
    assert not found.matched
    assert "blocks differ" in str(found.skipped[0])


class Refined(Timed):
    """A stack that refines the prompt in front of the timed one, of the same number of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.refiner = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, 0.0) for _ in range(3))

    def forward(self, x: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        for block in self.refiner:
            prompt = block(prompt)
        return super().forward(torch.cat([prompt, x], dim=1), timestep)


class Joined(nn.Module):
    """Two streams through one layer, as Flux' single blocks: the results are slices of one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        joined = torch.cat([text, image], dim=1)
        joined = joined + self.linear(joined)
        return joined[:, : text.shape[1]], joined[:, text.shape[1] :]


class Streams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Joined() for _ in range(3))
        self.leave = nn.Linear(8, 8)

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        for block in self.blocks:
            text, image = block(text, image)
        return self.leave(torch.nn.functional.layer_norm(image * text.mean(1, keepdim=True), (8,)))


@pytest.mark.usefixtures("however_small")
@torch.no_grad()
def test_stacks_inside_and_outside_the_branch() -> None:
    """torch knows a shared subgraph by its name, which has to be one of its own."""
    torch.manual_seed(0)
    model = Refined().eval()
    inputs = torch.randn(2, 5, 8), torch.tensor([500.0, 500.0]), torch.randn(2, 3, 8)
    fast = torch.compile(model, backend="accel", fullgraph=True)
    torch.testing.assert_close(fast(*inputs), model(*inputs))
    found = accel.report_of(fast).passes
    assert found["pade"].matched == ("refiner (3)",)  # of the two the larger
    assert found["outline"].details[0] == {"calls": 6, "subgraphs": 2}


@pytest.mark.usefixtures("however_small")
@pytest.mark.parametrize("training", [False, True])
def test_results_that_are_slices(training: bool) -> None:
    """Inductor would read them from the wrong place and write over its neighbours."""
    torch.manual_seed(0)
    model = Streams()
    inputs = torch.randn(2, 6, 8), torch.randn(2, 16, 8)
    fast = torch.compile(model, backend="accel", fullgraph=True)
    with torch.set_grad_enabled(training):
        expected, got = model(*inputs), fast(*inputs)
    torch.testing.assert_close(got, expected)
    assert accel.report_of(fast).passes["outline"].matched
    if training:
        parameters = list(model.parameters())
        wanted = torch.autograd.grad(expected.square().sum(), parameters)
        gradients = torch.autograd.grad(got.square().sum(), parameters)
        torch.testing.assert_close(gradients, wanted)


@torch.no_grad()
def test_blocks_that_are_one_operation_stay() -> None:
    """`nn.Sequential` numbers its layers as a list of blocks does."""

    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

        def forward(self, value: Tensor) -> Tensor:
            return self.project(value)

    model = Projected().eval()
    fast = torch.compile(model, backend="accel", fullgraph=True)
    fast(torch.randn(2, 8))
    found = accel.report_of(fast).passes["outline"]
    assert not found.matched
    assert "blocks too small to share" in str(found.skipped[0])
