"""What the kernels need on GPUs, by compiling them ahead of time."""

from __future__ import annotations

import json
import os
import subprocess
import sys

MATRIX = {"HMMA", "HGMMA", "UTCHMMA", "v_mfma_f32"}
SCRIPT = """
import dataclasses, json
from accel.kernels.dynamic_linear.resources import measured
print(json.dumps([dataclasses.asdict(row) for row in measured()]))
"""


def test_nothing_spills_and_matrix_units_are_used() -> None:
    """In a process of its own, since Triton's interpreter is on in this one."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    rows = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) == 3 * 4 * 2
    for row in rows:
        assert row["spills"] == 0, row
        assert row["dtype"] == "fp32" or MATRIX & set(row["matrix"]), row
