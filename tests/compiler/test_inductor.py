"""Inductor's caches keep apart what differs."""

from __future__ import annotations

import accel
import torch
from accel.tests.models import dit, euler, noise, relative
from accel.tests.predictors import Leaning, compiled

LABELS = torch.tensor([1, 2])


def test_inductors_cache_tells_two_objects_apart() -> None:
    """Their graphs differ, and it keys on those; the first one's code stays on the disk."""
    model = dit(2)
    for inside in (1.0, 0.25):
        finals = []
        for lowering in ("inductor", "eager"):
            torch.compiler.reset()
            fast = compiled(model, Leaning(inside=inside), lowering)
            finals.append(euler(fast, noise(), LABELS)[-1])
            assert accel.stats(fast).predicted_steps == 12
        assert relative(*finals) < 1e-4
