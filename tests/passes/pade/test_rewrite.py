"""The Padé pass on two streams: the skip branch guards and judges all of them."""

from __future__ import annotations

from typing import Any

import accel
import torch
from accel.tests.passes.test_blocks import Mix, Timed
from torch import Tensor, nn


class Pair(nn.Module):
    """A block of two residual streams, of which the second leads a life of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Mix(), Mix()

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(x), self.right(y)


class TwoStreams(Timed):
    """Both streams are read after the blocks, apart."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Pair() for _ in range(3))

    def forward(self, x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        time = self.embed(timestep)[:, None]
        x = self.enter(x) + time
        y = self.time(x[:, :3])
        for block in self.blocks:
            x, y = block(x, y)
        return self.leave(x) + time, self.leave(y)


def drive(model: nn.Module, poisoned: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """Five steps of a named branch; the third is computed with NaN in `poisoned`."""
    outputs = []
    with torch.no_grad(), accel.trajectory(model, steps=100, branch="only"):
        for step in range(5):
            if poisoned is not None:
                poisoned.fill_(float("nan") if step == 2 else 0.0)
            sample = torch.ones(2, 5, 8) * (1 - 0.02 * step)
            outputs.append(model(sample, torch.full((2,), 1000.0 - 50 * step)))
    return outputs


def test_nan_in_the_second_stream_alone_is_noticed() -> None:
    model = TwoStreams()
    # Random weights predict badly, which is not what is tested: no step is distrusted for that.
    pade = {"schedule": [0, 1, 2, 9], "max_error": 1e9}
    options = {"lowering": "eager", "verify": True, "pade": pade}
    fast = torch.compile(model, backend="accel", fullgraph=True, options=options)
    linear: Any = model.blocks[0].right.linear
    bias = linear.bias.detach().clone()
    del linear.bias
    linear.register_buffer("bias", bias)  # a weight that changes would cost the state
    outputs = drive(fast, bias)
    assert accel.report_of(fast).passes["pade"].details[0]["streams"] == 2
    assert torch.isnan(outputs[2][1]).any()
    assert torch.isfinite(outputs[2][0]).all()
    assert all(torch.isfinite(each).all() for step in (3, 4) for each in outputs[step])
    assert accel.stats(fast).nonfinite_steps == 1
    assert accel.stats(fast).untrusted_steps == 1


def test_both_streams_are_predicted_where_nothing_changes() -> None:
    """A model whose blocks add a constant: every prediction is exact, in both streams."""
    model = TwoStreams()
    with torch.no_grad():
        for mix in (m for m in model.modules() if isinstance(m, Mix)):
            mix.linear.weight.zero_()
    options = {"lowering": "eager", "verify": True, "pade": {"schedule": [0, 1, 2, 9]}}
    fast = torch.compile(model, backend="accel", fullgraph=True, options=options)
    got, expected = drive(fast, None), drive(model, None)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert accel.stats(fast).predicted_steps == 2
