"""Bad options are named before anything is compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accel import AccelError, Gate, OptionError, Options, PadeOptions
from accel.compiler.options import parse_options
from accel.kernels.predictors import Signals


def test_defaults() -> None:
    options = parse_options(None)
    assert options.of(PadeOptions) == PadeOptions()
    assert options.outline
    assert options.lowering == "inductor"


def test_dicts_and_dataclasses_are_alike() -> None:
    nested = {"pade": {"preset": "fast", "gate": {"score": "error", "threshold": 0.2}}}
    assert parse_options(nested) == Options(
        pade=PadeOptions(preset="fast", gate=Gate(score="error", threshold=0.2))
    )
    assert parse_options({"pade": False}).pade is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pad": True}, "did you mean 'pade'"),
        ({"pade": {"predicter": "pade"}}, "did you mean 'predictor'"),
        ({"pade": {"predictor": "magic"}}, "unknown predictor 'magic'"),
        ({"pade": {"predictor": 3}}, "predictor 3 is neither a known name nor an object"),
        ({"pade": {"preset": "best"}}, "unknown preset"),
        ({"pade": {"preset": "fast", "schedule": [0, 1]}}, "contradict"),
        ({"pade": {"schedule": [3]}}, "leaves out step 0"),
        ({"pade": {"gate": {"score": "cosine"}}}, "gate score"),
        ({"pade": {"gate": {"skip_if": ">"}}}, "skip_if"),
        ({"pade": {"gate": "chord"}}, "has to be a dict"),
        ({"pade": {"max_error": 0}}, "above 0"),
        ({"pade": {"max_runs": 0}}, "at least 1"),
        ({"pade": "yes"}, "True, False or a dict"),
        ({"outline": 1}, "True, False or a dict"),
        ({"outline": {"minimum": 1}}, "one block alone"),
        ({"verify": 1}, "True or False"),
        ({"dump": 3}, "a directory's path"),
        ({"lowering": "tvm"}, "none of inductor"),
        ("fast", "has to be a dict"),
    ],
)
def test_refusals(options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_options(options)


def test_torch_compile_names_the_error() -> None:
    model = torch.compile(torch.nn.Linear(2, 2), backend="accel", options={"outlin": True})
    with pytest.raises(Exception, match="did you mean 'outline'"):
        model(torch.ones(1, 2))
    assert issubclass(OptionError, AccelError)


@pytest.mark.parametrize(
    ("score", "value"), [("half-chord", 0.5), ("chord", 1.0), ("chord-sum", 3**0.5), ("error", 0.1)]
)
def test_gate_readings(score: str, value: float) -> None:
    signals = Signals(finite=True, turn=1.0, error=0.1)
    assert Gate(score=score).value(signals) == pytest.approx(value)
    assert Gate(score=score, skip_if="<", threshold=value + 0.01).allows(signals)
    assert not Gate(score=score, skip_if="<", threshold=value - 0.01).allows(signals)
    assert Gate(score=score, skip_if=">=", threshold=value - 0.01).allows(signals)
