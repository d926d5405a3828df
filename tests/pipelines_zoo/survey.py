"""What `accel.accelerate` makes of the pipelines: `python -m accel.tests.pipelines_zoo.survey`.

Writes `results/pipelines.csv`, row by row, and `results/pipelines.md`; rows that are there stay, so
that it can be cut off and go on. With names of pipelines, only these (nothing is written).
"""

from __future__ import annotations

import csv
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import accel
import torch
from accel.examples import records
from torch import nn

from ..models import relative
from . import NO_BATCHES, PIPELINES, PipelineEntry, latents

__all__ = ["Row", "checked"]

FOLDER = Path(__file__).parent / "results"
STEPS = 12
EQUAL = 1e-4
EAGER: dict[str, Any] = {"lowering": "eager"}
# Random weights predict badly; what is tested is which steps are predicted.
TRUSTING: dict[str, Any] = {**EAGER, "pade": {"max_error": 1e9}}


@dataclass(frozen=True)
class Row:
    """One pipeline. always: relative error with every step computed. computed, predicted: calls of
    the default preset, in a run of 12 steps; error: of its result. other: relative difference of
    a second call (other seed, prompt, size, batch and number of steps) from that of a pipeline
    which had no first. note: why nothing was predicted, or what was raised.
    """

    pipeline: str
    always: float = float("nan")
    computed: int = 0
    predicted: int = 0
    error: float = float("nan")
    other: float = float("nan")
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether always-compute is the plain pipeline, and a later call is what it is alone."""
        return self.always <= EQUAL and self.other <= EQUAL


def transformers(pipeline: Any) -> Iterator[nn.Module]:
    for name, each in pipeline.components.items():
        if isinstance(each, nn.Module) and "transformer" in name:
            yield each


def counted(pipeline: Any) -> tuple[int, int]:
    """Calls that were computed and predicted, of all transformers."""
    stats = [accel.stats(each) for each in transformers(pipeline)]
    return sum(each.full_steps for each in stats), sum(each.predicted_steps for each in stats)


def why_not(pipeline: Any) -> str:
    """What the Padé pass said where it declined."""
    for each in transformers(pipeline):
        try:
            report = accel.report_of(each)
        except accel.AccelError:
            continue
        if not report.fullgraph:
            return f"captured in parts, {len(report.graphs)} graphs"
        if skipped := report.passes["pade"].skipped:
            return str(skipped[-1])
    return ""


@torch.no_grad()
def checked(entry: PipelineEntry) -> Row:
    """One pipeline, called as its users do."""
    torch.compiler.reset()
    name = entry.key
    arguments = entry.arguments(steps=STEPS)
    plain = latents(entry.build(), arguments)
    try:
        full = {**EAGER, "pade": {"schedule": "full"}}
        always = relative(latents(accel.accelerate(entry.build(), **full), arguments), plain)
        fast = accel.accelerate(entry.build(), **TRUSTING)
        error = relative(latents(fast, arguments), plain)
        computed, predicted = counted(fast)
        batch = 1 if name in NO_BATCHES else 2
        size = 0 if entry.name == "DiTPipeline" else 1
        others = entry.arguments(seed=1, prompt=1, steps=10, size=size, batch=batch)
        alone = accel.accelerate(entry.build(), **TRUSTING)
        expected = latents(alone, others)
        other = relative(latents(fast, others), expected)
        second = counted(fast)[0] - computed
    except Exception as problem:
        return Row(name, note=f"{type(problem).__name__}: {str(problem)[:200]}")
    note = "" if predicted else why_not(fast) or "no step was predicted"
    if other > EQUAL:
        note = f"second call: {second} computed, in a pipeline of its own {counted(alone)[0]}"
    return Row(name, always, computed, predicted, error, other, " ".join(note.split())[:160])


def run(folder: Path) -> None:
    """Check what is not in the table yet, and write both files."""
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "pipelines.csv"
    rows = {}
    if table.is_file():
        with table.open(newline="") as file:
            rows = {row["pipeline"]: row for row in csv.DictReader(file)}
    for key, entry in PIPELINES.items():
        if key in rows:
            continue
        row = checked(entry)
        print(row, flush=True)
        rows[key] = {name: str(value) for name, value in asdict(row).items()}
        records.write(table, list(rows.values()))
    (folder / "pipelines.md").write_text(_page(list(rows.values())))


def _page(rows: list[dict[str, str]]) -> str:
    found = [
        Row(r["pipeline"], float(r["always"]), int(r["computed"]), int(r["predicted"]),
            float(r["error"]), float(r["other"]), r["note"])
        for r in rows
    ]  # fmt: skip
    lines = [
        "# Pipelines of diffusers through `accel.accelerate`",
        "",
        f"{len(found)} pipelines in small random versions, {STEPS} steps. In "
        f"{sum(row.holds for row in found)} the result with every step computed equals the plain "
        "pipeline's, and a second call (other seed, prompt, size, batch, 10 steps) is what it is "
        f"in a pipeline of its own, both to 1e-4; {sum(row.predicted > 0 for row in found)} "
        "predict steps. The error is that of random weights, with the check of errors off. State "
        "does not pass from graph to graph: where Dynamo compiles anew inside a run, more steps "
        "are computed; the note has how many in each.",
        "",
        "| pipeline | always computed | calls computed, predicted | error | second call | note |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.pipeline} | {row.always:.1e} | {row.computed}, {row.predicted} | {row.error:.3f} "
        f"| {row.other:.1e} | {row.note} |"
        for row in found
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if sys.argv[1:]:
        for chosen in sys.argv[1:]:
            print(checked(PIPELINES[chosen]))
    else:
        run(FOLDER)
