"""The benches of runs, with one row of each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accel.examples.runs import lengths, recognition


def test_a_row_of_recognition(tmp_path: Path) -> None:
    row = recognition.measured("flow Euler", "none", torch.float32)
    assert (row.recognised, row.wrong, row.pairs) == (1.0, 0, recognition.PAIRS)
    noisy = recognition.measured("DDPM", "none", torch.float32)
    assert (noisy.recognised, noisy.wrong) == (0.0, 0)
    recognition.write(tmp_path, [row])
    assert "| flow Euler | 100% |" in (tmp_path / "recognition.md").read_text()


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscrete", "DPMSolverMultistep, Karras"])
def test_a_row_of_lengths(name: str, tmp_path: Path) -> None:
    """The second run keeps to the plan, and so does one that says how long it is."""
    row = lengths.measured(name, 20, torch.float32)
    assert not row.declined
    assert row.first >= row.second == row.explicit == row.planned == 8
    lengths.write(tmp_path, [row])
    assert f"| {name} | 20, 8: {row.first}, 8, 8 |" in (tmp_path / "lengths.md").read_text()


def test_a_scheduler_that_needs_more_is_named() -> None:
    row = lengths.measured("RePaint", 20, torch.float32)
    assert row.calls == 0
    assert "'original_image' and 'mask'" in row.declined
