"""The command line: `accel demo`, `accel bench` and `accel explain`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..kernels.errors import AccelError, MissingDependencyError

__all__ = ["main"]


def _table(title: str, rows: Sequence[Any], columns: dict[str, str]) -> Any:
    from rich.table import Table

    table = Table(title=title)
    for heading in columns:
        table.add_column(heading, justify="left" if heading == "run" else "right")
    for row in rows:
        cells = [getattr(row, name) for name in columns.values()]
        table.add_row(*("-" if cell is None else str(cell) for cell in cells))
    return table


def _application() -> Any:
    try:
        import typer
        from rich.console import Console
        from rich.progress import Progress
    except ImportError as error:
        raise MissingDependencyError(
            "the command line needs typer and rich: pip install 'accel-compiler[examples]'"
        ) from error

    application = typer.Typer(help="Graph-level compiler passes that make generative models fast.")
    console = Console()

    @application.command()
    def demo(output: Path = Path("accel_demo"), pictures: int = 40, seed: int = 0) -> None:
        """Sample Fashion-MNIST pictures with and without accel; draw and measure both."""
        from ..examples.fashion import demo as example

        with Progress(console=console) as progress:
            task = progress.add_task("loading", total=1.0)
            rows = example.run(
                output,
                pictures=pictures,
                seed=seed,
                progress=lambda text, share: progress.update(
                    task, description=text, completed=share
                ),
            )
        columns = {
            "run": "name", "seconds": "seconds", "speed-up": "speedup", "full steps": "full_steps",
            "PSNR (dB)": "psnr", "class agreement": "agreement", "Fréchet": "frechet",
        }  # fmt: skip
        console.print(
            _table(f"{pictures} pictures, guidance, {example.STEPS} steps", rows, columns)
        )
        console.print(f"written: {output / 'demo.png'}, {output / 'demo.json'}")

    bench = typer.Typer(help="Benchmarks; each takes from minutes to hours.")
    application.add_typer(bench, name="bench")

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
        from ..examples.fashion.bench import run

        run.run(
            output,
            subject=subject,
            lengths=[int(each) for each in lengths.split(",")],
            pictures=pictures,
            progress=lambda text: console.print(text, markup=False),
        )
        console.print(f"written: {output / f'pade-{subject}.md'}, .json and .png")

    @application.command()
    def explain(builder: str) -> None:
        """Say what accel would do with a model.

        BUILDER is package.module:function; the function returns (model, args, kwargs).
        """
        import torch

        from .report import explain as report

        module, _, name = builder.partition(":")
        if not name:
            raise AccelError(f"{builder!r} has to be package.module:function")
        sys.path.insert(0, "")
        model, args, kwargs = getattr(importlib.import_module(module), name)()
        with torch.no_grad():
            console.print(str(report(model, *args, **kwargs)), markup=False)

    return application


def main() -> None:
    """Entry point of the `accel` command."""
    try:
        _application()()
    except AccelError as error:
        sys.exit(f"accel: {error}")
