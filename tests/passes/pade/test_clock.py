"""Which inputs are taken for the time of a step."""

from __future__ import annotations

import accel
import pytest
import torch
from accel.tests.passes.test_blocks import Timed
from torch import Tensor


class Placed(Timed):
    """Tokens of a small picture of 8 channels; each has the time it is given, or all have one."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        time = self.embed(timestep.flatten()).unflatten(0, (len(sample), -1))
        if time.shape[1] not in (1, 16):
            time = time.mean(1, keepdim=True)
        states = self.body(self.enter(sample.flatten(2).transpose(1, 2)), time)
        return self.leave(states).transpose(1, 2).unflatten(2, (4, 4))


@pytest.mark.parametrize(
    "shape", [(3,), (1,), (3, 1), (3, 16), (3, 1, 1, 1), (3, 1, 4, 4), (3, 1, 1, 4, 4), (1,) * 5]
)
@torch.no_grad()
def test_times_of_any_shape(shape: tuple[int, ...]) -> None:
    """One a sample (or one for all, expanded), a token, a frame, a place: steps are predicted."""
    # Copies of a model that sample from one noise are told apart by nothing.
    torch.manual_seed(100 * len(shape) + shape[-1])
    model = Placed()
    options = {"lowering": "eager", "pade": {"schedule": [0, 1, 2, 4], "max_error": 1e9}}
    fast = torch.compile(model, backend="accel", fullgraph=True, options=options)
    sample = torch.randn(3, 8, 4, 4)
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
    report = accel.explain(Placed(), torch.randn(3, 8, 4, 4), torch.randn(3, 8, 4, 4))
    assert not report.passes["pade"].matched
    assert report.passes["pade"].skipped[-1].reason.value == "no timestep"
