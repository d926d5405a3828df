"""The demo: one grid of pictures, sampled plainly and with accel, side by side.

accel demo
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ... import stats
from . import classifier, measure, model
from .data import CLASSES

STEPS = 20
PLAIN, FEWER = "torch.compile, 20 steps", "torch.compile, 8 steps"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    seconds: median of the timed runs. psnr: mean true PSNR to the plain 20-step run, in dB.
    agreement: share of pictures classified as they were meant. frechet: Fréchet distance of the
    classifier's features to those of real test images (few samples: compare within the table).
    """

    name: str
    seconds: float
    speedup: float
    full_steps: int
    psnr: float | None
    agreement: float
    frechet: float


@dataclass
class _Contestant:
    name: str
    network: Any
    steps: int
    seconds: list[float]
    images: Tensor | None = None
    full_steps: int = 0


def _contestants() -> list[_Contestant]:
    """Each accelerated model is a copy of its own: accel keeps its records by model."""
    plain = torch.compile(model.load())
    found = [_Contestant(PLAIN, plain, STEPS, [])]
    for preset in ("quality", "balanced", "fast"):
        options: Any = {"pade": {"preset": preset}}
        accelerated = torch.compile(model.load(), backend="accel", options=options)
        found.append(_Contestant(f'backend="accel", "{preset}"', accelerated, STEPS, []))
    found.append(_Contestant(FEWER, plain, 8, []))
    return found


def run(
    output: Path,
    *,
    pictures: int = 40,
    repeats: int = 3,
    seed: int = 0,
    progress: Callable[[str, float], None] = lambda text, share: None,
) -> list[Row]:
    """Sample, time, measure; write `demo.png` and `demo.json` into `output`.

    progress(text, share) is told how far the demo is, share from 0 to 1.
    """
    judge = classifier.load()
    noise = torch.randn(pictures, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(pictures) % len(CLASSES)
    contestants = _contestants()
    measure.keep_memory()
    total, done = len(contestants) * (1 + repeats), 0

    def sample(one: _Contestant, text: str) -> Tensor:
        picture = noise
        states = model.sample(one.network, noise, labels, steps=one.steps)
        for step, state in enumerate(states, start=1):
            picture = state
            progress(f"{text}: {one.name}", (done + step / one.steps) / total)
        return picture

    for one in contestants:
        with torch.no_grad():
            one.images = sample(one, "compiling and first run")
        done += 1
    # Alternating, so that a noisy machine is noisy for all.
    for _ in range(repeats):
        for one in contestants:
            before = stats(one.network).predicted_steps
            started = time.perf_counter()
            sample(one, "timing")
            one.seconds.append(time.perf_counter() - started)
            one.full_steps = one.steps - (stats(one.network).predicted_steps - before)
            done += 1

    reference = contestants[0]
    assert reference.images is not None
    rows = []
    for one in contestants:
        assert one.images is not None
        with torch.no_grad():
            frechet = judge.frechet_distance(one.images)
        fidelity = float(measure.psnr(one.images, reference.images).mean())
        rows.append(
            Row(
                one.name,
                round(median(one.seconds), 3),
                round(median(reference.seconds) / median(one.seconds), 2),
                one.full_steps,
                None if one is reference else round(fidelity, 2),
                round(measure.agreement(judge, one.images, labels), 3),
                round(frechet, 2),
            )
        )
    balanced = contestants[2]
    assert balanced.images is not None
    output.mkdir(parents=True, exist_ok=True)
    _draw(output / "demo.png", reference.images, balanced.images, rows)
    machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    record = {
        "pictures": pictures, "steps": STEPS, "seed": seed, "threads": torch.get_num_threads(),
        **machine, "rows": [asdict(row) for row in rows],
    }  # fmt: skip
    (output / "demo.json").write_text(json.dumps(record, indent=2) + "\n")
    return rows


def grid(images: Tensor, columns: int = len(CLASSES)) -> Tensor:
    """Pictures `[count, 1, height, width]` laid out in rows of `columns`: `[H, W]` in [0, 1]."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    padded = torch.zeros(rows * columns, height, width)
    padded[:count] = (images[:, 0].clamp(-1, 1) + 1) / 2
    return padded.view(rows, columns, height, width).permute(0, 2, 1, 3).reshape(
        rows * height, columns * width
    )  # fmt: skip


def _draw(path: Path, plain: Tensor, fast: Tensor, rows: Sequence[Row]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 2.4 + 0.1 * len(plain)))
    titles = (
        f"{rows[0].name}: {rows[0].seconds:.2f} s",
        f"{rows[2].name}: {rows[2].seconds:.2f} s ({rows[2].speedup:.2f}x), {rows[2].psnr:.1f} dB",
        "their difference, times 4",
    )
    difference = ((plain - fast).abs() * 4).clamp(0, 2) - 1
    for axis, title, images in zip(axes, titles, (plain, fast, difference), strict=True):
        axis.imshow(grid(images), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
