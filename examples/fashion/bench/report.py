"""The bench's record, table and plot."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from .fidelity import Row
from .subjects import Subject

__all__ = ["recorded", "table", "write"]


def write(output: Path, subject: Subject, rows: Sequence[Row], command: str) -> None:
    """Write `pade-<subject>.json`, `.md` and `.png` into `output`."""
    output.mkdir(parents=True, exist_ok=True)
    rows = sorted(rows, key=lambda row: row.steps)
    record = {
        "command": command, "subject": subject.name, "samples": subject.samples,
        "seeds": subject.seeds, "tuning_samples": subject.tuning, "torch": torch.__version__,
        "processor": platform.machine(), "threads": torch.get_num_threads(),
        "rows": [asdict(row) for row in rows],
    }  # fmt: skip
    (output / f"pade-{subject.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (output / f"pade-{subject.name}.md").write_text(_heading(subject, command) + table(rows))
    _draw(output / f"pade-{subject.name}.png", rows)


def recorded(output: Path, subject: Subject) -> list[Row]:
    """The rows of an earlier record in `output`, if there is one."""
    path = output / f"pade-{subject.name}.json"
    if not path.is_file():
        return []
    return [Row(**row) for row in json.loads(path.read_text())["rows"]]


def _heading(subject: Subject, command: str) -> str:
    return (
        f"Made by `{command}`. Subject {subject.name}: mean true PSNR to the full run of the same "
        f"length over {subject.samples} samples and {subject.seeds} seed(s); every method tuned on "
        f"{subject.tuning} other sample(s). Cost is block evaluations in full steps. Speed-up is "
        "over plain `torch.compile` (Inductor), the method itself compiled / eager.\n\n"
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, best first within each run length."""
    lines = []
    for steps, computed in dict.fromkeys((row.steps, row.computed) for row in rows):
        lines += [
            f"### {steps} steps at the cost of {computed}", "",
            "| method | PSNR (dB) | by seed | relative error | cost | speed-up | tuned to |",
            "|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        group = [row for row in rows if row.steps == steps]
        for row in sorted(group, key=lambda row: -row.psnr):
            seeds = " / ".join(f"{value:.1f}" for value in row.by_seed)
            lines.append(
                f"| {row.method} | {row.psnr:.1f} | {seeds} | {row.error:.2%} | {row.cost:g} "
                f"| {_speed(row)} | {row.setting} |"
            )
        lines.append("")
    notes = [f"- {row.method}, {row.steps} steps: {row.note}" for row in rows if row.note]
    return "\n".join([*lines, *notes]).rstrip() + "\n"


def _speed(row: Row) -> str:
    known = [f"{row.speedup}x" if row.speedup else "fails" if row.note else "-"]
    if row.speedup_eager is not None:
        known.append(f"{row.speedup_eager}x")
    return " / ".join(known)


def _draw(path: Path, rows: Sequence[Row]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = list(dict.fromkeys((row.steps, row.computed) for row in rows))
    figure, axes = pyplot.subplots(1, len(lengths), figsize=(7 * len(lengths), 6), squeeze=False)
    for axis, (steps, computed) in zip(axes[0], lengths, strict=True):
        group = [row for row in rows if row.steps == steps]
        timed = any(row.speedup or row.speedup_eager for row in group)
        for row in group:
            fastest = max(row.speedup or 0.0, row.speedup_eager or 0.0)
            across = (fastest or None) if timed else steps / row.cost
            if across is None:
                continue
            ours = row.method.startswith("accel")
            axis.scatter(across, row.psnr, color="tab:blue" if ours else "tab:grey")
            axis.annotate(row.method, (across, row.psnr), fontsize=7, rotation=20)
        axis.set_title(f"{steps} steps at the cost of {computed}")
        axis.set_xlabel("speed-up over Inductor" if timed else "steps / cost (not timed)")
        axis.set_ylabel("PSNR to the full run (dB)")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
