"""A user's own predictor: what is refused and why, and that what is accepted runs everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import accel
import pytest
import torch
from accel import OptionError, PadeOptions
from accel.kernels.predictors import PREDICTORS, Predictor
from accel.kernels.predictors.pade import Pade
from accel.passes.pade.trial import accepted
from accel.tests.models import dit, euler, noise, relative
from accel.tests.predictors import Leaning, compiled
from torch import Tensor

LABELS = torch.tensor([1, 2])
UNSOUND = {"tc-pade-paper", "tc-pade-paper-reversed", "tc-pade-release"}


class Plain:
    """Not a dataclass, and without coefficients."""

    history = 1
    granularity = "token"
    keeps_predictions = True
    reads_inputs = True

    def coefficients(self, times: Tensor, remaining: Tensor, moments: Tensor) -> None:
        return None

    def predict(self, residuals: Sequence[Tensor], coefficients: None, inputs: Any) -> Tensor:
        now, before = inputs
        return residuals[0].float() + 0.1 * (now - before).float()


def test_names_stay_and_equals_of_known_ones_become_names() -> None:
    for name in PREDICTORS:
        assert accepted(name) == name
    assert accepted(Pade()) == "pade"
    assert PadeOptions(predictor=Pade()) == PadeOptions(predictor="pade")
    assert PadeOptions(predictor=Pade(start=0.3, turned=0.75)) == PadeOptions()
    own = Leaning()
    assert accepted(own) is own
    assert accepted(Plain()).history == 1


@pytest.mark.parametrize("name", PREDICTORS)
def test_the_trial_passes_what_is_sound_among_accels_own(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accel.passes.pade.trial.registered_name", lambda predictor: None)
    if name in UNSOUND:
        with pytest.raises(OptionError, match="does not reproduce a constant: it answers"):
            accepted(PREDICTORS[name])
    else:
        assert accepted(PREDICTORS[name]) is PREDICTORS[name]


def lacking(*names: str) -> Any:
    kept = {name: value for name, value in vars(Plain).items() if name not in names}
    return type("Lacking", (), kept)()


@pytest.mark.parametrize(
    ("predictor", "message"),
    [
        ("magic", "unknown predictor 'magic'; known: pade,"),
        (None, "predictor None is neither .* lacks history, granularity, keeps_predictions"),
        (Leaning, r"is the class Leaning; hand over an object of it: Leaning\(\)"),
        (lacking("predict"), "Lacking.* it lacks predict$"),
        (lacking("history", "coefficients"), "it lacks history, coefficients$"),
        (Leaning(history=0), "history is 0; it has to be a whole number from 1"),
        (Leaning(history=True), "history is True; it has to be a whole number"),
        (Leaning(history=2.0), "history is 2.0; it has to be a whole number"),
        (Leaning(granularity="batch"), "granularity is 'batch'; .* 'sample', 'channel', 'token'"),
        (Leaning(keeps_predictions=None), "keeps_predictions is None; it has to be True or False"),
        (Leaning(reads_inputs=1), "reads_inputs is 1; it has to be True or False"),
        (
            Leaning(history=0, granularity=None),
            "history is 0; .*; granularity is None; it has to be one of",
        ),
    ],
)
def test_what_is_missing_or_of_the_wrong_type_is_named(predictor: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        PadeOptions(predictor=predictor)


def test_a_part_that_is_no_method_is_named() -> None:
    class Wrong(Plain):
        predict: Any = 3

    with pytest.raises(OptionError, match="predict is 3; it has to be a method"):
        accepted(Wrong())


def forecasting(method: str, function: Any) -> Any:
    """`Leaning` with another method."""
    return type("Wrong", (Leaning,), {method: function})()


def newest(residuals: Sequence[Tensor]) -> Tensor:
    return residuals[0].float() * 1.0


def in_place(self: Any, residuals: Any, coefficients: Any, inputs: Any) -> Tensor:
    residuals[1].mul_(0.5)
    return newest(residuals)


LEARNT = torch.ones(4)
CALLS: list[int] = []


def written_into(self: Any, residuals: Any, coefficients: Any, inputs: Any) -> Tensor:
    result = newest(residuals)
    result.add_(residuals[0] - residuals[1])
    return result


def counting(self: Any, residuals: Any, coefficients: Any, inputs: Any) -> Tensor:
    CALLS.append(1)
    return newest(residuals) + len(CALLS) * (residuals[0] - residuals[1])


@pytest.mark.parametrize(
    ("method", "function", "message"),
    [
        # What the protocol says of the results.
        ("predict", lambda s, r, c, i: 1.02 * r[0], "does not reproduce a constant: it answers"),
        ("predict", lambda s, r, c, i: newest(r) + 1e-2, "does not reproduce a constant"),
        (
            "predict",
            lambda s, r, c, i: newest(r) + (r[0] - r[1]) / ((r[0] - r[1]).abs() + 1),
            "not scale-equivariant: residuals times 0.000976562 give",
        ),
        (
            "predict",
            lambda s, r, c, i: newest(r) + (r[0] - r[1]) / (r[0] - r[1]).norm(),
            "returns NaN or Inf for a constant, even times",
        ),
        (
            "coefficients",
            lambda s, t, left, m: ((t[0] - t[1]) / (t[1] - t[2]))[None],
            "returns NaN or Inf for a constant, one residual known",
        ),
        ("predict", lambda s, r, c, i: None, "returns a NoneType, not a tensor"),
        ("predict", lambda s, r, c, i: r[0].double(), "returns torch.float64 .* has to be float32"),
        ("predict", lambda s, r, c, i: newest(r)[:, :1], r"\[2, 1, 4\]; it has to be float32"),
        ("predict", lambda s, r, c, i: r[0], "one of its arguments or a view of it"),
        ("predict", lambda s, r, c, i: r[0].view_as(r[0]), "one of its arguments or a view of it"),
        ("predict", in_place, "changes its arguments in place"),
        ("coefficients", lambda s, t, left, m: 0.5, "returns float; it has to be a floating-point"),
        ("coefficients", lambda s, t, left, m: torch.ones(1, 2, dtype=torch.int64), "torch.int64"),
        ("coefficients", lambda s, t, left, m: left, r"has the shape \[\] for a constant"),
        (
            "coefficients",
            lambda s, t, left, m: torch.ones(len(t.unique()), 2),
            r"has the shape \[.*, before \[.*one count for all times",
        ),
        # What runs on values, but not in a graph.
        ("predict", lambda s, r, c, i: r[0] @ c, "predict of predictor .* raises RuntimeError"),
        ("predict", lambda s: None, "predict of predictor .* raises TypeError"),
        (
            "predict",
            lambda s, r, c, i: newest(r) if r[0].sum() > 0 else r[0].clone(),
            "predict .* raises .* without control flow on values",
        ),
        ("predict", lambda s, r, c, i: newest(r) * LEARNT, "without tensors of its own"),
        (
            "predict",
            lambda s, r, c, i: torch.cat(newest(r).split(2, -1), -1),
            "without operations that return several",
        ),
        (
            "coefficients",
            lambda s, t, left, m: torch.full((1, 2), float(left)),
            "coefficients .* raises .* without control flow on values",
        ),
        ("predict", written_into, "computes something else as a graph: .* in place"),
        # What is not a function of its arguments.
        ("predict", counting, "must not draw numbers or remember calls"),
        (
            "predict",
            lambda s, r, c, i: newest(r) + torch.randn(()) * (r[0] - r[1]),
            "must not draw numbers or remember calls",
        ),
    ],
)
def test_a_trial_finds(method: str, function: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        accepted(forecasting(method, function))


def test_the_error_that_was_raised_is_kept() -> None:
    with pytest.raises(OptionError) as caught:
        accepted(forecasting("predict", lambda s: None))
    assert isinstance(caught.value.__cause__, TypeError)


# What is accepted


def test_an_object_runs_like_the_same_predictor_by_name() -> None:
    """`Leaning(1)` is the line through two residuals, so it is "linear"."""
    model = dit(2)
    own = euler(compiled(model, Leaning(gain=1.0)), noise(), LABELS)
    torch.compiler.reset()
    expected = euler(compiled(model, "linear"), noise(), LABELS)
    for got, wanted in zip(own, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()
    other = compiled(model, Leaning(gain=0.5))
    assert relative(euler(other, noise(), LABELS)[-1], expected[-1]) > 1e-4
    assert accel.stats(other).predicted_steps == 12


def test_a_predictor_without_coefficients_that_reads_inputs_runs() -> None:
    fast = compiled(dit(2), Plain())
    assert all(torch.isfinite(each).all() for each in euler(fast, noise(), LABELS))
    assert accel.stats(fast).predicted_steps == 12


def test_a_fresh_object_of_equal_fields_is_the_same_option() -> None:
    one, other = Leaning(gain=0.3), replace(Leaning(), gain=0.3)
    assert PadeOptions(predictor=one) == PadeOptions(predictor=other)
    checked: Predictor | str = PadeOptions(predictor=one).predictor
    assert checked is one
