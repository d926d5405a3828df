"""Which inputs are taken for the time of a step."""

from __future__ import annotations

import accel
import pytest
import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, states: Tensor, time: Tensor) -> Tensor:
        return states + self.outer((self.inner(states + time)).tanh())


class Timed(nn.Module):
    """Tokens of a small picture; each has the time that it is given, or all have one."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave, self.time = nn.Linear(2, 8), nn.Linear(8, 2), nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        angles = timestep.reshape(len(sample), -1, 1) * torch.logspace(0, -3, 4)
        time = self.time(torch.cat([angles.sin(), angles.cos()], 2))
        if time.shape[1] not in (1, 16):
            time = time.mean(1, keepdim=True)
        states = self.enter(sample.flatten(2).transpose(1, 2))
        for block in self.blocks:
            states = block(states, time)
        return self.leave(states).transpose(1, 2).unflatten(2, (4, 4))


@pytest.mark.parametrize(
    "shape", [(3,), (1,), (3, 1), (3, 16), (3, 1, 1, 1), (3, 1, 4, 4), (3, 1, 1, 4, 4), (1,) * 5]
)
@torch.no_grad()
def test_times_of_any_shape(shape: tuple[int, ...]) -> None:
    """One for all, one a sample, a token, a frame, a place: steps are predicted, by their time."""
    # Copies of a model that sample from one noise are told apart by nothing.
    torch.manual_seed(100 * len(shape) + shape[-1])
    model = Timed()
    options = {"lowering": "eager", "pade": {"schedule": [0, 1, 2, 4], "max_error": 1e9}}
    fast = torch.compile(model, backend="accel", fullgraph=True, options=options)
    sample = torch.randn(3, 2, 4, 4)
    for step in range(5):
        time = torch.full(shape, 1 - step / 5)
        given = time.expand(3, *shape[1:])
        output, wanted = fast(sample, given), model(sample, given)
        assert torch.equal(output, wanted) == (step != 3)
        sample = sample - output / 5
    stats = accel.stats(fast)
    assert (stats.runs, stats.full_steps, stats.predicted_steps) == (1, 4, 1)


@torch.no_grad()
def test_what_has_channels_is_no_time() -> None:
    """A picture whose sines are embedded (as features of its values) says nothing of the step."""
    report = accel.explain(Timed(), torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4))
    assert not report.passes["pade"].matched
    assert report.passes["pade"].skipped[-1].reason.value == "no timestep"
