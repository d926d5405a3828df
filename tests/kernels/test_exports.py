"""An operator of accel's own leaves as plain torch, inside the branch too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accel
import pytest
import torch
from accel.kernels.exports import EXPORT_BODIES
from accel.tests.models import dit, noise
from torch import Tensor, nn


@torch.library.custom_op("accel_test::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Twice(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return twice(self.inner(*args, **kwargs))


@pytest.mark.parametrize("inside", [True, False])
def test_a_body_of_plain_torch(
    inside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx

    monkeypatch.setitem(EXPORT_BODIES, torch.ops.accel_test.twice.default, lambda x: x + x)
    model = dit(2)
    if inside:
        for block in model.transformer_blocks:
            block.ff = Twice(block.ff)
    else:
        model.pos_embed = Twice(model.pos_embed)
    kwargs = {"timestep": torch.full((2,), 1000.0), "class_labels": torch.tensor([1, 2])}
    engine = accel.export(model, (noise(),), kwargs, path=tmp_path / "dit.onnx")
    assert next(record for record in engine.manifest.passes if record.name == "pade").matched
    domains = {node.domain for node in onnx.load(tmp_path / "dit.onnx").graph.node}
    assert domains <= {"", "pkg.onnxscript.torch_lib"}
    with torch.no_grad():
        expected = model(noise(), **kwargs).sample
    torch.testing.assert_close(engine(noise(), **kwargs).sample, expected, rtol=1e-4, atol=1e-5)
