"""Which predictors an engine takes: those that have a name."""

from __future__ import annotations

from typing import Any

import accel
import pytest
import torch
from accel import ExportError
from accel.kernels.predictors import Predictor, predictor_name
from accel.kernels.predictors.chebyshev import Chebyshev
from accel.kernels.predictors.hermite import Hermite
from accel.kernels.predictors.polynomial import Taylor
from accel.tests.models import dit, euler, noise, relative
from accel.tests.predictors import Leaning, compiled

LABELS = torch.tensor([1, 2])


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_an_engine_refuses_an_object_by_name(kind: str, tmp_path: Any) -> None:
    kwargs = {"timestep": torch.full((2,), 1000.0), "class_labels": LABELS}
    for own in (Leaning(gain=0.25), Taylor(order=4)):
        name = predictor_name(own)
        with pytest.raises(ExportError) as caught:
            accel.export(
                dit(2), (noise(),), kwargs, path=tmp_path / f"dit.{kind}",
                options={"pade": {"predictor": own}},
            )  # fmt: skip
        assert f"the predictor {name} is an object" in str(caught.value)
        assert "export_repository" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "name", "predictor"),
    [("onnx", "chebyshev", Chebyshev()), ("ep", "hermite", Hermite())],
)
def test_an_engine_takes_an_object_that_has_a_name(
    kind: str, name: str, predictor: Predictor, tmp_path: Any
) -> None:
    kwargs = {"timestep": torch.full((2,), 1000.0), "class_labels": LABELS}
    pade = {"predictor": predictor, "max_error": 1e9}
    engine = accel.export(
        dit(2), (noise(),), kwargs, path=tmp_path / f"dit.{kind}", options={"pade": pade}
    )
    assert engine.manifest.options["pade"]["predictor"] == name
    got = euler(engine, noise(), LABELS)
    expected = euler(compiled(dit(2), name, max_error=1e9), noise(), LABELS)
    assert max(map(relative, got, expected)) < 1e-4
    assert engine.stats().predicted_steps == 12
