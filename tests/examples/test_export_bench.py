"""The record of `accel bench export`."""

from __future__ import annotations

import json
from pathlib import Path

from accel.examples.export.bench import Result, write


def test_table_and_record(tmp_path: Path) -> None:
    results = [
        Result(".onnx", 1.9e-6, True, 0.0315, 2.31, (0.012, 2.46), 17_000_000, 0.94, 1),
        Result(".pt2", 0.0, True, 0.016, 2.15, (0.011, 2.4), 20_000_000, 1.03, None),
    ]
    write(tmp_path, results, "fails: it says so", "a command", 4)
    record = json.loads((tmp_path / "export.json").read_text())
    assert record["command"] == "a command"
    assert [row["ifs"] for row in record["results"]] == [1, None]
    text = (tmp_path / "export.md").read_text()
    assert "| .onnx | 1.9e-06 | True | 3.1% | 2.31x | 1.2%, 2.46x | 0.94 | 1 |" in text
    assert "| .pt2 | 0.0e+00 | True | 1.6% | 2.15x | 1.1%, 2.4x | 1.03 | - |" in text
    assert "it says so" in text
