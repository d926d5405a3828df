"""What the benchmarks here have in common: timing a call, and writing what was found."""

from __future__ import annotations

import csv
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["seconds", "write"]


def seconds(call: Any, inputs: tuple[Any, ...]) -> float:
    """What one call takes."""
    started = time.perf_counter()
    call(*inputs)
    return time.perf_counter() - started


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A table with the first row's names for its columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
