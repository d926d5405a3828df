"""Block discovery on hand-made stacks: what is found, and why the rest is refused."""

from __future__ import annotations

from typing import Any

import accel
import pytest
import torch
from accel.passes.graph.nodes import ancestors
from accel.passes.pade.region import find_region
from accel.tests.models import program_of
from torch import Tensor, nn


class Mix(nn.Module):
    """A residual block: `x + linear(norm(x))`."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x))


class Timed(nn.Module):
    """A model with a sinusoidal timestep embedding around `body(x, time_embedding)`."""

    def __init__(self, count: int = 3, width: int = 8) -> None:
        super().__init__()
        self.time = nn.Linear(width, width)
        self.enter = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Mix(width) for _ in range(count))
        self.leave = nn.Linear(width, width)

    def embed(self, timestep: Tensor) -> Tensor:
        frequencies = torch.exp(-torch.arange(4, device=timestep.device))
        angles = timestep[:, None] * frequencies[None]
        return self.time(torch.cat([angles.sin(), angles.cos()], dim=-1))

    def body(self, x: Tensor, time: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x + time)
        return x

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        time = self.embed(timestep)[:, None]
        return self.leave(self.body(self.enter(x), time))


def report(model: nn.Module, *inputs: Any) -> accel.Report:
    inputs = inputs or (torch.randn(2, 5, 8), torch.tensor([500.0, 500.0]))
    with torch.no_grad():
        return accel.explain(model, *inputs, options={"verify": True})


def reasons(found: accel.Report) -> str:
    assert not found.passes["pade"].matched
    return "; ".join(map(str, found.passes["pade"].skipped))


def test_found() -> None:
    found = report(Timed()).passes["pade"]
    assert found.matched == ("blocks (3)",)
    assert found.details[0]["pairing"] == "additive"


def test_long_skips_pair_by_shape() -> None:
    """As in U-ViT and Hunyuan-DiT: late blocks read early ones through a projection."""

    class LongSkips(Timed):
        def __init__(self) -> None:
            super().__init__(4)
            self.join = nn.Linear(16, 8)

        def body(self, x: Tensor, time: Tensor) -> Tensor:
            early = []
            for block in self.blocks[:2]:
                x = block(x + time)
                early.append(x)
            for block in self.blocks[2:]:
                x = block(self.join(torch.cat([x, early.pop()], dim=-1)))
            return x

    found = report(LongSkips()).passes["pade"]
    assert found.matched == ("blocks (4)",)
    assert found.details[0]["pairing"] == "same shape"


@torch.no_grad()
def test_of_several_activations_the_stream_is_what_enters_first() -> None:
    """As with a ControlNet on Hunyuan-DiT: hints of the stream's shape join the long skips."""

    class Hinted(Timed):
        def __init__(self) -> None:
            super().__init__(4)
            self.join, self.hint = nn.Linear(16, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, timestep: Tensor, hint: Tensor) -> Tensor:
            time = self.embed(timestep)[:, None]
            hints, early = [self.hint(hint), self.hint(hint) * 2], []
            x = self.enter(x)
            for block in self.blocks[:2]:
                x = block(x + time)
                early.append(x)
            for block in self.blocks[2:]:
                x = block(self.join(torch.cat([x, early.pop() + hints.pop()], dim=-1)))
            return self.leave(x)

    model, hint = Hinted(), torch.randn(2, 5, 8)
    program = program_of(model, torch.randn(2, 5, 8), torch.tensor([500.0, 500.0]), hint)
    region, refused = find_region(program.module.graph, program.memory)
    assert region is not None, refused
    (stream,) = region.streams
    assert not stream.additive
    made_of = " ".join(node.name for node in ancestors([stream.partner]))
    assert "enter" in made_of
    assert "hint" not in made_of


@pytest.mark.parametrize("in_turn", [True, False])
def test_stacks_side_by_side_keep_to_what_is_theirs(in_turn: bool) -> None:
    """Two encoders of one shape and without residuals: neither is the partner of the other."""

    class Beside(Timed):
        def __init__(self) -> None:
            super().__init__(2)
            self.first, self.second = (
                nn.ModuleList([nn.Linear(8, 8) for _ in range(2)]) for _ in range(2)
            )

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            time = self.embed(timestep)[:, None]
            left, right = self.enter(x) + time, self.enter(x) * time
            if in_turn:
                for one, other in zip(self.first, self.second, strict=True):
                    left, right = one(left), other(right)
                return left * right
            for one in self.first:
                left = one(left)
            for other in self.second:
                right = other(right)
            return left * right

    model = Beside().eval()
    program = program_of(model, torch.randn(2, 4, 8), torch.rand(2))
    region, refused = find_region(program.module.graph, program.memory)
    assert region is not None, refused
    for stream in region.streams:
        assert stream.partner in ancestors([stream.output])
    assert region.blocks == 4


def test_streams_that_are_joined_in_the_blocks_are_one() -> None:
    class Joined(Timed):
        def body(self, x: Tensor, time: Tensor) -> Tensor:
            other = self.time(x[:, :3])
            for block in self.blocks:
                both = block(torch.cat([x + time, other], dim=1))
                x, other = both[:, :5], both[:, 5:]
            return x + other.mean(dim=1, keepdim=True)

    found = report(Joined()).passes["pade"]
    assert found.matched
    assert found.details[0]["streams"] == 1


def test_two_streams_are_both_predicted() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = Mix(), Mix()

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.left(x + y.mean(dim=1, keepdim=True)), self.right(y)

    class TwoStreams(Timed):
        def body(self, x: Tensor, time: Tensor) -> Tensor:
            y = self.time(x[:, :3])
            for block in self.blocks:
                x, y = block(x, y)
            return x + time + y.sum(dim=1, keepdim=True)

    model = TwoStreams()
    model.blocks = nn.ModuleList(Pair() for _ in range(3))
    found = report(model).passes["pade"]
    assert found.matched
    assert found.details[0]["streams"] == 2


def test_streams_of_equal_length_are_told_apart() -> None:
    """Text and image of one length: the slice says which is which."""

    class EqualStreams(Timed):
        def body(self, x: Tensor, time: Tensor) -> Tensor:
            other = self.time(x)
            for block in self.blocks:
                both = block(torch.cat([other, x + time], dim=1))
                other, x = both[:, :5], both[:, 5:]
            return x

    found = report(EqualStreams()).passes["pade"]
    assert found.matched
    assert found.details[0]["pairing"] == "additive"


def test_a_change_in_place_of_its_own_values_is_fine() -> None:
    class Rotates(Mix):
        def forward(self, x: Tensor) -> Tensor:
            out = torch.empty_like(x)
            out[..., 0::2] = x[..., 1::2]
            out[..., 1::2] = x[..., 0::2]
            return x + self.linear(out)

    model = Timed()
    model.blocks = nn.ModuleList(Rotates() for _ in range(3))
    assert report(model).passes["pade"].matched


def test_a_change_in_place_of_an_input_is_refused() -> None:
    class Spoils(Timed):
        def body(self, x: Tensor, time: Tensor) -> Tensor:
            shared = x * 2
            for block in self.blocks:
                x = block(x + shared)
                shared.mul_(0.5)
            return x

    assert "side effects" in reasons(report(Spoils()))


def test_randomness_is_refused() -> None:
    class Noisy(Mix):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.linear(x + torch.rand_like(x))

    model = Timed()
    model.blocks = nn.ModuleList(Noisy() for _ in range(3))
    assert "side effects" in reasons(report(model))


def test_no_blocks() -> None:
    class Flat(Timed):
        def body(self, x: Tensor, time: Tensor) -> Tensor:
            return self.blocks[0](x + time)

    assert "no repeated blocks" in reasons(report(Flat()))


def test_no_timestep() -> None:
    class Untimed(Timed):
        def embed(self, timestep: Tensor) -> Tensor:
            return self.time(timestep[:, None].expand(-1, 8))

    assert "no timestep" in reasons(report(Untimed()))


def test_a_constant_timestep_says_what_to_do() -> None:
    class Constant(Timed):
        def forward(self, x: Tensor, timestep: Any) -> Tensor:
            return super().forward(x, torch.full((2,), timestep))

    assert "pass a tensor" in reasons(report(Constant(), torch.randn(2, 5, 8), 500.0))


def test_a_changed_shape_is_refused() -> None:
    class Shrinks(Mix):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)[:, 1:]

    model = Timed()
    model.blocks = nn.ModuleList(Shrinks() for _ in range(3))
    assert "no residual partner" in reasons(report(model))
