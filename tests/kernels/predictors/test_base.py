"""What predictors share: young histories, moments and what they say, names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from accel.kernels.errors import OptionError
from accel.kernels.predictors import judge, moments, predictor_name, resolve
from accel.kernels.predictors.base import distinct
from accel.kernels.predictors.hermite import Hermite
from accel.kernels.predictors.pade import Pade
from accel.kernels.predictors.polynomial import Taylor


def test_a_repeated_time_ends_the_history_of_its_sample() -> None:
    times = torch.tensor([[9.0, 9.0, 9.0], [8.0, 9.0, 8.0], [7.0, 7.0, 9.0], [6.0, 6.0, 6.0]])
    known = [[True] * 3, [True, False, True], [True, False, False], [True, False, False]]
    assert distinct(times).tolist() == known


def test_signals() -> None:
    actual = torch.tensor([[3.0, 4.0], [0.0, 5.0]])
    guess = torch.tensor([[3.0, 4.0], [0.0, 4.0]])
    east = torch.tensor([[2.0, 4.0], [0.0, 4.0]])
    earlier = [east, east - torch.tensor([1.0, 0.0])]
    for granularity in ("sample", "token", "channel"):
        shape = (2, 2) if granularity != "channel" else (2, 1, 2)
        views = [each.view(shape) for each in (actual, *earlier, guess)]
        measured = moments(views[0], views[1:3], views[3], granularity)
        signals = judge([measured])
        assert signals.finite
        # The first sample goes straight on (chord 0), the second turns by 90 degrees.
        assert signals.turn == pytest.approx(math.sqrt(2) / 2, abs=1e-3)
        assert signals.error == pytest.approx(0.2)
        broken = moments(views[0] * float("nan"), views[1:3], views[3], granularity)
        assert not judge([measured, broken]).finite
        assert judge([measured, broken]).error == math.inf


def test_unknown_name() -> None:
    with pytest.raises(OptionError, match="known: pade"):
        resolve("pad")


@dataclass(frozen=True)
class Custom:
    gain: float = 0.5
    weights: tuple[float, ...] = (1.0, 2.0)
    anything: object = object()


def test_names_are_the_same_in_every_process() -> None:
    assert predictor_name("pade") == predictor_name(Pade()) == "pade"
    assert predictor_name(Taylor(order=1)) == "linear"
    own: Any = Custom()
    assert (
        predictor_name(own) == f"{__name__}.Custom(gain=0.5, weights=(1.0, 2.0), anything=<object>)"
    )
    assert resolve(own) is own
    assert "scale=0.7" in predictor_name(Hermite(scale=0.7))
