"""Exporting every transformer of the zoo, and what came of it.

    python -m accel.tests.zoo.exporting onnx [names...]

prints a line for each class: whether its engine equals the model on computed steps and the
compiled model on a predicted one, and if not, why.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import accel
import torch

from . import ENTRIES
from .parts import step_inputs, tensors

__all__ = ["check"]

# Random weights predict badly; what is tested is that the step is skipped.
PADE = {"schedule": [0, 1, 2, 9], "max_error": 1e9}
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}


@torch.no_grad()
def check(name: str, kind: str, folder: Path, free_sizes: bool = True) -> str:
    """Export one class and compare; "" or what the Padé pass said where it declined.

    Raises AssertionError where results differ, and whatever the export raises.
    """
    entry = ENTRIES[name]
    model = entry.build()
    options = {"pade": PADE}
    engine = accel.export(model, (), step_inputs(entry, 0), path=folder / f"{name}.{kind}",
                          options=options, free_sizes=free_sizes)  # fmt: skip
    jit = torch.compile(
        model, backend="accel", fullgraph=True, options={**options, "lowering": "eager"}
    )
    for step in range(4):
        inputs = step_inputs(entry, step)
        expected = tensors(jit(**inputs) if step == 3 else model(**inputs))
        if step < 3:
            jit(**inputs)
        for one, other in zip(tensors(engine(**inputs)), expected, strict=True):
            torch.testing.assert_close(one, other, **TOLERANCE)
    pade = next(record for record in engine.manifest.passes if record.name == "pade")
    if not pade.matched:
        return pade.skipped[-1]
    got, wanted = engine.stats(), accel.stats(jit)
    assert (got.full_steps, got.predicted_steps) == (wanted.full_steps, wanted.predicted_steps)
    return "" if got.predicted_steps else "no step was predicted"


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"FAILED {type(error).__name__}: {text[:300]}"


def _fixed(name: str, kind: str, folder: Path) -> str:
    """What comes of it with all sizes fixed; "" if that fails too."""
    torch.compiler.reset()
    try:
        outcome = check(name, kind, folder, free_sizes=False)
    except Exception:  # that with free sizes is told
        return ""
    return f"{outcome or 'equal, one step predicted'}; with fixed sizes only"


def main(kind: str, names: list[str]) -> Iterator[str]:
    """One line for each class."""
    for name in names or sorted(ENTRIES):
        torch.compiler.reset()
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcome = check(name, kind, Path(folder)) or "equal, one step predicted"
            except Exception as error:  # each is a finding
                outcome = _fixed(name, kind, Path(folder)) or _line(error)
        yield f"{name}: {outcome} ({time.perf_counter() - started:.0f} s)"


if __name__ == "__main__":
    for line in main(sys.argv[1], sys.argv[2:]):
        print(line, flush=True)
