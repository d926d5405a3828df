"""The command line: `accel explain`, `calibrate`, `export`, `run`, `tensorrt`, and what entry
points add."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..kernels.errors import AccelError, ExportError, MissingDependencyError

__all__ = ["main", "table"]


def table(title: str, rows: Sequence[Any], columns: dict[str, str]) -> Any:
    """A rich table of rows. columns: the attribute of a row that stands under each heading."""
    from rich.table import Table

    made = Table(title=title)
    for heading in columns:
        made.add_column(heading, justify="left" if heading == "run" else "right")
    for row in rows:
        cells = [getattr(row, name) for name in columns.values()]
        made.add_row(*("-" if cell is None else _text(cell) for cell in cells))
    return made


def _text(cell: Any) -> str:
    return " x ".join(map(str, cell)) if isinstance(cell, tuple) else str(cell)


def _build(builder: str, parts: Sequence[str] = ("model", "args", "kwargs")) -> tuple[Any, ...]:
    """Call the function that `package.module:function` names; it returns these parts."""
    module, _, name = builder.partition(":")
    if not name:
        raise AccelError(f"{builder!r} has to be package.module:function")
    sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise AccelError(f"{builder!r} can't be found: {error}") from error
    built = function()
    if not isinstance(built, tuple) or len(built) != len(parts):
        raise AccelError(
            f"{builder} has to return ({', '.join(parts)}), not {type(built).__name__}"
        )
    return built


def _add_entry_points(application: Any) -> None:
    """Add the commands that the entry points `accel.commands` name: functions and typer's apps."""
    from typer import Typer

    for entry in entry_points(group="accel.commands"):
        try:
            command = entry.load()
        except ModuleNotFoundError as error:
            if not f"{entry.module}.".startswith(f"{error.name}."):
                raise  # the module is there, and another that it needs is not
            settings = {"ignore_unknown_options": True, "allow_extra_args": True}
            command = _absent(entry.name, str(error.name))
            application.command(entry.name, context_settings=settings)(command)
            continue
        if isinstance(command, Typer):
            application.add_typer(command, name=entry.name)
        else:
            application.command(entry.name)(command)


def _absent(name: str, module: str) -> Callable[[], None]:
    def command() -> None:
        """Only in a checkout of the repository."""
        raise MissingDependencyError(
            f"`accel {name}` belongs to a checkout of accel's repository; {module} is not in this "
            "installation. Clone the repository and, in it, run pip install -e '.[examples]'"
        )

    return command


def _application() -> Any:
    try:
        import typer
        from rich.console import Console
        from rich.progress import Progress
    except ImportError as error:
        raise MissingDependencyError(
            "the command line needs typer and rich: pip install 'accel-compiler[examples]'"
        ) from error

    from .export import FORMATS

    application = typer.Typer(help="Graph-level compiler passes that make generative models fast.")
    console = Console()

    dump_path = typer.Option(None, help="A directory for each graph, before and after each pass.")

    @application.command()
    def explain(builder: str, dump: Path = dump_path) -> None:
        """Say what accel would do with a model, and how long each pass takes.

        BUILDER is package.module:function; the function returns (model, args, kwargs).
        """
        import torch

        from .report import explain as report

        model, args, kwargs = _build(builder)
        with torch.no_grad():
            found = report(model, *args, options={"dump": dump}, **kwargs)
        console.print(str(found), markup=False)
        if dump is not None:
            console.print(f"written: {dump}", markup=False)

    profile_path = typer.Option(Path("profile.json"), "--output", "-o", help="The profile's file.")
    plot_path = typer.Option(None, help="A picture of fidelity over speed, such as curve.png.")

    @application.command()
    def calibrate(builder: str, output: Path = profile_path, plot: Path = plot_path) -> None:
        """Find out how few steps of a model need computing; computes about twelve full runs.

        BUILDER is package.module:function; the function returns (model, run): a model compiled with
        backend="accel", and what samples with it from the noise of a seed. Use the profile by the
        option "pade": {"profile": PROFILE, "min_psnr": 40}.
        """
        from .calibration import calibrate as find
        from .plots import draw_profile

        model, sample = _build(builder, ("model", "run"))
        with Progress(console=console) as progress:
            task = progress.add_task("calibrating", total=1.0)
            profile = find(
                model, sample, output=output,
                progress=lambda share, text: progress.update(
                    task, completed=share, description=text
                ),
            )  # fmt: skip
        rows = [
            SimpleNamespace(
                computed=f"{len(point.computed)} of {profile.steps}",
                speed=f"{profile.speed(point):.2f}",
                psnr=f"{point.psnr:.1f}" + (f" ± {point.error:.1f}" if point.error else ""),
                steps=", ".join(map(str, point.computed)),
            )
            for point in profile.points
        ]
        columns = {"computed": "computed", "times faster": "speed", "dB": "psnr", "steps": "steps"}
        console.print(table(type(getattr(model, "_orig_mod", model)).__name__, rows, columns))
        if plot is not None:
            draw_profile(profile, plot)
        console.print(f"written: {output}" + (f", {plot}" if plot else ""), markup=False)

    kinds = "; ".join(f"{form.suffix}: {form.summary}" for form in FORMATS)
    engine_path = typer.Argument(None, help=f"The engine to write, by its suffix ({kinds}).")
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
        console.print(table("inputs", engine.manifest.inputs, columns))
        if engine.manifest.state is not None:
            console.print(f"state: {engine.manifest.state.bytes} bytes a sampling run")
        console.print(f"written: {path} ({path.stat().st_size} bytes)")

    @application.command()
    def tensorrt(path: Path) -> None:
        """Check an ONNX file against TensorRT's published operator support (nothing is run)."""
        from .export.tensorrt import check_tensorrt, published_support

        findings = check_tensorrt(path)
        columns = {"finding": "kind", "operator": "operator", "node": "node", "why": "detail"}
        console.print(table(str(path), findings, columns))
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

    _add_entry_points(application)
    return application


def main() -> None:
    """Entry point of the `accel` command."""
    try:
        _application()()
    except AccelError as error:
        sys.exit(f"accel: {error}")
