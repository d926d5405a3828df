"""Every transformer of the zoo through one way of lowering, and what came of it.

    python -m accel.tests.zoo.survey {onnx,pt2,inductor,dynamic} [names...]

prints a line for each class: whether computed steps equal the model and a predicted step equals
that of the graph run as it is (lowering "eager"), and if not, why. "dynamic" is Inductor with
dynamic=True. Takes about a minute a class; the results are in tests/zoo/results.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accel
import torch

from . import ENTRIES
from .parts import Entry, next_inputs, step_inputs, tensors

__all__ = ["survey"]

# Random weights predict badly; what is tested is that the step is skipped.
OPTIONS: dict[str, Any] = {"pade": {"schedule": [0, 1, 2, 9], "max_error": 1e9}}
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}


def _exported(
    model: torch.nn.Module, entry: Entry, path: Path, free_sizes: bool
) -> tuple[Callable[..., Any], Callable[[], Any], Callable[[], accel.Stats]]:
    engine = accel.export(
        model, (), step_inputs(entry, 0), path=path, options=OPTIONS, free_sizes=free_sizes
    )
    records = {record.name: record for record in engine.manifest.passes}
    return engine, lambda: records["pade"], engine.stats


def _compiled(
    model: torch.nn.Module, dynamic: bool | None
) -> tuple[Callable[..., Any], Callable[[], Any], Callable[[], accel.Stats]]:
    fast = torch.compile(model, backend="accel", fullgraph=True, options=OPTIONS, dynamic=dynamic)
    return fast, lambda: accel.report_of(fast).passes["pade"], lambda: accel.stats(fast)


@torch.no_grad()
def check(name: str, kind: str, folder: Path, free_sizes: bool = True) -> str:
    """Lower one class and compare; "" or what the Padé pass said where it declined.

    Raises AssertionError where results differ, and whatever the lowering raises.
    """
    entry = ENTRIES[name]
    model = entry.build()
    if kind in ("inductor", "dynamic"):
        fast, pade, stats = _compiled(model, dynamic=True if kind == "dynamic" else None)
    else:
        fast, pade, stats = _exported(model, entry, folder / f"{name}.{kind}", free_sizes)
    eager = torch.compile(
        model, backend="accel", fullgraph=True, options={**OPTIONS, "lowering": "eager"}
    )
    inputs = step_inputs(entry, 0)
    for step in range(4):
        outputs = eager(**inputs)
        expected = tensors(outputs if step == 3 else model(**inputs))
        for one, other in zip(tensors(fast(**inputs)), expected, strict=True):
            torch.testing.assert_close(one, other, **TOLERANCE)
        inputs = next_inputs(entry, inputs, outputs, step + 1)
    if not pade().matched:
        return str(pade().skipped[-1])
    got, wanted = stats(), accel.stats(eager)
    assert (got.full_steps, got.predicted_steps) == (wanted.full_steps, wanted.predicted_steps)
    return "" if got.predicted_steps else "no step was predicted"


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"FAILED {type(error).__name__}: {text[:300]}"


@torch.no_grad()
def _without_accel(name: str, kind: str) -> str:
    """Whether torch alone manages this class in this way."""
    torch.compiler.reset()
    entry = ENTRIES[name]
    model = entry.build()
    try:
        plain = torch.compile(model, fullgraph=True, dynamic=True if kind == "dynamic" else None)
        for step in range(3):
            inputs = step_inputs(entry, step)
            pairs = zip(tensors(plain(**inputs)), tensors(model(**inputs)), strict=True)
            for one, other in pairs:
                torch.testing.assert_close(one, other, **TOLERANCE)
    except Exception as error:
        return f"; torch.compile alone: {_line(error)}"
    return "; torch.compile alone: equal"


def _second_try(name: str, kind: str, folder: Path) -> str:
    """An export with all sizes fixed; "" if that fails too."""
    torch.compiler.reset()
    try:
        outcome = check(name, kind, folder, free_sizes=False)
    except Exception:  # that with free sizes is told
        return ""
    return f"{outcome or 'equal, predicted step equal'}; with fixed sizes only"


def survey(kind: str, names: list[str]) -> Iterator[str]:
    """One line for each class."""
    for name in names or sorted(ENTRIES):
        torch.compiler.reset()
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcome = check(name, kind, Path(folder)) or "equal, predicted step equal"
            except Exception as error:  # each is a finding
                if kind in ("inductor", "dynamic"):
                    outcome = _line(error) + _without_accel(name, kind)
                else:
                    outcome = _second_try(name, kind, Path(folder)) or _line(error)
        yield f"{name}: {outcome} ({time.perf_counter() - started:.0f} s)"


if __name__ == "__main__":
    for line in survey(sys.argv[1], sys.argv[2:]):
        print(line, flush=True)
