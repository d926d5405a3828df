"""What the kernels need on GPUs, by compiling them ahead of time."""

from __future__ import annotations

import json
import os
import subprocess
import sys

MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma_f32"}

SCRIPT = """
import dataclasses, json
from accel.kernels.omnisparse.resources import measured
print(json.dumps([dataclasses.asdict(row) for row in measured(widths=(64, 128))]))
"""


def test_nothing_spills_and_matrix_units_are_used() -> None:
    """In a process of its own, since Triton's interpreter is on in this one."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    rows = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) == 5 * len(MATRIX) * 2
    for row in rows:
        assert row["spills"] == 0, row
        assert 0 < row["occupancy"] <= 1, row
        if row["kernel"] == "probe_kernel":  # 32 rows are too few for Hopper's units and later ones
            assert {"HMMA", "v_mfma_f32"} & set(row["matrix"]), row
        elif row["width"] == 64:  # so are the blocks of wider gradients
            assert MATRIX[row["target"]] in row["matrix"], row
