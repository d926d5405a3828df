"""What a model makes at its first call is there when it is captured again."""

from __future__ import annotations

import copy
from typing import Any

import accel
import pytest
import torch
from accel.compiler.models.second_look import SecondLook
from accel.tests.pipelines_zoo import PIPELINES, latents
from torch import Tensor, nn


class Place:
    """Makes a table at its first call, on a device of its own, where Dynamo breaks the graph."""

    def __init__(self) -> None:
        self.table: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.table is None:
            with torch.device("cpu"):
                self.table = torch.linspace(0, 1, 8)
        return x + self.table


class Model(nn.Module):
    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.place = Place()
        self.breaks = breaks

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        """scale: to see that arguments by keyword arrive."""
        x = self.linear(x)
        if self.breaks:
            torch._dynamo.graph_break()
        return self.linear(self.place(x)) * scale


def looked_at(model: nn.Module) -> SecondLook:
    torch._dynamo.reset()
    model.compile(backend="accel", options={"lowering": "eager"})
    model._compiled_call_impl = look = SecondLook(model)
    return look


@torch.no_grad()
def test_a_table_that_is_made_at_the_first_call() -> None:
    plain, other = Model(), Model()
    model = copy.deepcopy(plain)
    look = looked_at(model)
    x = torch.randn(2, 8)
    expected = plain(x, scale=2.0)
    torch.testing.assert_close(model(x, scale=2.0), expected)
    assert "forward" in vars(model)
    torch.testing.assert_close(model(x, scale=2.0), expected)
    assert accel.report_of(model).fullgraph
    torch.testing.assert_close(copy.deepcopy(model)(x, scale=2.0), expected)
    assert "forward" not in vars(other)
    look.undo()
    assert "forward" not in vars(model)
    torch.testing.assert_close(model(x, scale=2.0), expected)


@torch.no_grad()
def test_what_breaks_for_another_reason_is_left() -> None:
    """A model that changes nothing at its first call would be captured in parts again."""
    model = Model(breaks=True)
    model.place.table = torch.zeros(8)
    looked_at(model)
    model(torch.randn(2, 8))
    assert "forward" not in vars(model)
    assert not accel.report_of(model).fullgraph


@torch.no_grad()
def test_a_forward_of_the_models_own_is_left() -> None:
    """As offloading puts one there."""
    model = Model()
    hooked = model.__dict__["forward"] = model.forward
    look = looked_at(model)
    model(torch.randn(2, 8))
    assert vars(model)["forward"] is hooked
    look.undo()
    assert vars(model)["forward"] is hooked


@pytest.mark.parametrize("name", ["ZImagePipeline"])
def test_a_pipeline(name: str) -> None:
    """Z-Image makes its tables of positions at the first call."""
    entry, arguments = PIPELINES[name], PIPELINES[name].arguments(steps=8)
    torch._dynamo.reset()
    plain = latents(entry.build(), arguments)
    always = accel.accelerate(entry.build(), lowering="eager", pade={"schedule": "full"})
    for _ in range(2):
        torch.testing.assert_close(latents(always, arguments), plain, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
    fast = accel.accelerate(entry.build(), lowering="eager", pade={"max_error": 1e9})
    latents(fast, arguments)
    first = accel.stats(fast.transformer)
    latents(fast, arguments)
    second: Any = accel.stats(fast.transformer)
    assert first.predicted_steps > 0
    assert second.full_steps - first.full_steps == second.predicted_steps - first.predicted_steps
    other = accel.accelerate(type(entry.build())(**fast.components), lowering="eager")
    assert "forward" not in vars(fast.transformer)  # it is compiled with other options now
    latents(other, arguments)
    accel.release(other)
    accel.release(fast)
    assert "forward" not in vars(fast.transformer)
    torch.testing.assert_close(latents(fast, arguments), plain, rtol=1e-4, atol=1e-4)
