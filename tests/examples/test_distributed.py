"""Two processes learn what one does, and find the same in tables that they share."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest


def started(processes: int, *arguments: str) -> str:
    """What processes print that know of each other, by gloo."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_train_as_one_does() -> None:
    script = str(Path(__file__).with_name("share_training.py"))
    one, two = (json.loads(started(count, script).splitlines()[-1]) for count in (1, 2))
    assert len(one["loss"]) == 3
    assert one["loss"][-1] < one["loss"][0]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert two["uauc"] == pytest.approx(one["uauc"], abs=0.02)


def test_shared_tables() -> None:
    found = started(2, "-m", "accel.examples.recommender.scale", "--sharded")
    assert "rows of a table here: 5001 of 10002" in found
    losses = [tuple(map(float, each)) for each in re.findall(r"whole ([\d.]+), shared (.+)", found)]
    assert len(losses) == 4
    assert len({whole for whole, _ in losses}) == 4
    for whole, shared in losses:
        assert shared == pytest.approx(whole, abs=1e-5)
