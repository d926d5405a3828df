"""All measurements of ZipAR, one after the other, and their tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ....compiler.models.zipar import ZipAR
from ....kernels.errors import OptionError
from ... import records
from ..generator import load_generator
from ..tokenizer import COLUMNS, load_tokenizer
from .baselines import Jacobi, Released
from .quality import of_pictures, real
from .speed import compared

__all__ = ["PARTS", "run"]

PARTS = ("quality", "speed")
Way = tuple[str, Callable[..., ZipAR], dict[str, Any]]
ALONE = {"first_row_alone": True}
WAYS: tuple[Way, ...] = (
    *((f"window {n}", ZipAR, {"window": n}) for n in (COLUMNS, 8, 6, 5, 4, 3, 2, 1)),
    *((f"first row alone, window {n}", ZipAR, {"window": n} | ALONE) for n in (4, 3, 2, 1)),
    *((f"adaptive from {n}", ZipAR, {"window": n, "adaptive": True}) for n in (3, 2, 1)),
    *((f"first row alone, adaptive from {n}", ZipAR, {"window": n, "adaptive": True} | ALONE)
      for n in (2, 1)),
    ("released mask, window 3", Released, {"window": 3}),
    *((f"Jacobi, {n} drafts", Jacobi, {"window": n}) for n in (8, 16)),
)  # fmt: skip
TIMED: tuple[Way, ...] = (
    (f"window {COLUMNS}", ZipAR, {"window": COLUMNS}),
    *((f"window 3, {k} passes a graph", ZipAR, {"window": 3, "unroll": k}) for k in (8, 4, 1)),
    ("first row alone, window 2", ZipAR, {"window": 2} | ALONE),
    ("adaptive from 2", ZipAR, {"window": 2, "adaptive": True}),
    ("Jacobi, 16 drafts", Jacobi, {"window": 16}),
)
WINDOWS = tuple(way for way in WAYS if way[0] in [f"window {n}" for n in (COLUMNS, 4, 3, 2)])
TEMPERATURES = {1.0: WAYS, 0.8: WINDOWS, 0.6: WINDOWS}


def run(
    output: Path,
    parts: Sequence[str] = PARTS,
    pictures: int = 1000,
    repeats: int = 5,
    progress: Callable[[str], None] = print,
) -> None:
    """Write a table of each part into `output`."""
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise OptionError(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    output.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_generator(), load_tokenizer()
    if "quality" in parts:
        rows = [real(model, tokenizer, pictures)]
        for temperature, ways in TEMPERATURES.items():
            sequential, *others = [(*way, 0) for way in ways]
            # Once more with other random numbers: what a difference between rows may mean.
            again = f"{sequential[0]}, again", *sequential[1:3], 1
            for name, kind, settings, seed in (sequential, again, *others):
                rows.append(
                    of_pictures(model, tokenizer, name, kind, settings, temperature, pictures, seed)
                )
                progress(str(rows[-1]))
                _write(output / "quality.csv", map(asdict, rows))
    if "speed" in parts:
        for batch in (1, 16):
            timed = compared(load_generator, batch, TIMED, repeats, progress)
            for row in timed:
                progress(str(row))
            _write(output / f"speed_batch_{batch}.csv", map(asdict, timed))


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    rounded = [
        {key: round(each, 4) if isinstance(each, float) else each for key, each in row.items()}
        for row in rows
    ]
    records.write(path, rounded)
