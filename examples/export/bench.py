"""What an engine is worth: agreement, speed and size, next to plain exports.

accel bench export
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import Engine, export, stats, trajectory
from ..fashion import measure
from ..fashion import model as fashion
from ..fashion.bench.subjects import SUBJECTS, final

__all__ = ["Result", "count_ifs", "run", "write"]

STEPS = 20


@dataclass(frozen=True)
class Result:
    """One format on the reference model, 20 steps with preset "balanced".

    worst_error: relative L2 error to the JIT path, worst step. same_sequence: whether both computed
    and predicted the same steps. step_ratio: a predicted step's seconds over a computed one's.
    speedup: of the run over that of the same model's engine without the skip branch. told: both of
    a run in `accel.trajectory`, in which no step has to be recognised. ifs: `If` nodes in the file
    (ONNX). size_ratio: file size over that of torch's own export.
    """

    format: str
    worst_error: float
    same_sequence: bool
    step_ratio: float
    speedup: float
    told: tuple[float, float]
    size: int
    size_ratio: float
    ifs: int | None


class _Recorded:
    """A model that notes each call's result and seconds."""

    def __init__(self, call: Any, predicted: Callable[[], int]) -> None:
        self.call, self.predicted = call, predicted
        self.outputs: list[Tensor] = []
        self.seconds: list[float] = []
        self.skipped: list[bool] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before, started = self.predicted(), time.perf_counter()
        result = self.call(*args, **kwargs)
        self.seconds.append(time.perf_counter() - started)
        self.skipped.append(self.predicted() > before)
        self.outputs.append(result[0])
        return result

    @property
    def step_ratio(self) -> float:
        """A predicted step's seconds over a computed one's, medians."""
        predicted, computed = (
            statistics.median(
                seconds
                for seconds, skipped in zip(self.seconds, self.skipped, strict=True)
                if skipped is kind
            )
            for kind in (True, False)
        )
        return round(predicted / computed, 4)


def _sample(call: Any, pictures: int) -> None:
    final(call, *SUBJECTS["reference"].noise(pictures, 0), STEPS)


def count_ifs(path: Path) -> int | None:
    """`If` nodes in an ONNX file, in branches and functions too; None for another format."""
    if path.suffix != ".onnx":
        return None
    import onnx

    def count(graph: Any) -> int:
        inner = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
        return sum(node.op_type == "If" for node in graph.node) + sum(map(count, inner))

    model = onnx.load(path, load_external_data=False)
    return count(model.graph) + sum(map(count, model.functions))


def _plain_export(path: Path) -> None:
    """The unmodified model through torch's own exporters, as they come."""
    args, kwargs = fashion.example()
    network = fashion.load()
    batch = torch.export.Dim("batch", min=2)
    shapes = {"hidden_states": {0: batch}, "timestep": {0: batch}, "class_labels": {0: batch}}
    with torch.no_grad():
        if path.suffix == ".onnx":
            torch.onnx.export(network, args, path, kwargs=kwargs, dynamo=True, verbose=False,
                              dynamic_shapes=shapes, external_data=False)  # fmt: skip
        else:
            program = torch.export.export(network, args, kwargs, dynamic_shapes=shapes)
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def hooked_export(path: Path) -> str:
    """What torch's ONNX export makes of a diffusers hook (FirstBlockCache), in one sentence."""
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    args, kwargs = fashion.example()
    network = fashion.load()
    apply_first_block_cache(network, FirstBlockCacheConfig(threshold=0.28))
    _set_cache_context(network, CacheContext("guided"))
    try:
        with torch.no_grad():
            torch.onnx.export(network, args, path, kwargs=kwargs, dynamo=True, verbose=False)
    except Exception as error:  # whatever another project's code meets in the exporter
        text = " ".join(str(error).split())
        return f"fails: {type(error).__name__}: {text[:160]}"
    ifs = count_ifs(path)
    return f"exports without an error; {ifs} `If` nodes and no state, so the cache is " + (
        "dropped" if not ifs else "kept"
    )


def _compare(folder: Path, suffix: str, pictures: int, repeats: int) -> Result:
    args, kwargs = fashion.example()
    path, plain_path = folder / f"skip{suffix}", folder / f"plain{suffix}"
    engine = export(fashion.load(), args, kwargs, path=path,
                    options={"pade": {"preset": "balanced"}})  # fmt: skip
    off = export(fashion.load(), args, kwargs, path=folder / f"off{suffix}",
                 options={"pade": False})  # fmt: skip
    _plain_export(plain_path)

    jit: Any = torch.compile(fashion.load(), backend="accel")
    reference = _Recorded(jit, lambda: stats(jit).predicted_steps)
    _sample(reference, pictures)
    recorded = _Recorded(engine, lambda: engine.stats().predicted_steps)
    _sample(recorded, pictures)
    errors = [float((a - b).norm() / b.norm())
              for a, b in zip(recorded.outputs, reference.outputs, strict=True)]  # fmt: skip

    def noting() -> _Recorded:
        return _Recorded(engine, lambda: engine.stats().predicted_steps)

    recognised, told = noting(), noting()
    seconds: dict[str, list[float]] = {"recognised": [], "told": [], "without": []}
    for _ in range(repeats):
        seconds["recognised"].append(_seconds(recognised, pictures))
        with trajectory(engine, steps=STEPS):
            seconds["told"].append(_seconds(told, pictures))
        seconds["without"].append(_seconds(off, pictures))
    median = {way: statistics.median(each) for way, each in seconds.items()}
    size = path.stat().st_size
    return Result(
        suffix, max(errors), recorded.skipped == reference.skipped,
        recognised.step_ratio, round(median["without"] / median["recognised"], 2),
        (told.step_ratio, round(median["without"] / median["told"], 2)),
        size, round(size / plain_path.stat().st_size, 3), count_ifs(path),
    )  # fmt: skip


def _seconds(call: Engine | _Recorded, pictures: int) -> float:
    started = time.perf_counter()
    _sample(call, pictures)
    return time.perf_counter() - started


def run(
    output: Path,
    *,
    pictures: int = 40,
    repeats: int = 3,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Result]:
    """Measure both formats; write `export.json` and `export.md` into `output`."""
    measure.keep_memory()
    output.mkdir(parents=True, exist_ok=True)
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for suffix in (".onnx", ".pt2"):
            results.append(_compare(folder, suffix, pictures, repeats))
            progress(str(results[-1]))
        hooked = hooked_export(folder / "hooked.onnx")
        progress(f"torch.onnx.export of the model with FirstBlockCache: {hooked}")
    write(output, results, hooked, f"accel bench export --pictures {pictures}", pictures)
    return results


def write(
    output: Path, results: Sequence[Result], hooked: str, command: str, pictures: int
) -> None:
    """Write `export.json` and `export.md`."""
    record = {
        "command": command, "torch": torch.__version__,
        "threads": torch.get_num_threads(), "hooked_export": hooked,
        "results": [asdict(result) for result in results],
    }  # fmt: skip
    (output / "export.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [
        f"Made by `{command}`: the reference model, {pictures} pictures with guidance, "
        f"{STEPS} steps of which 8 are computed.", "",
        "| format | worst error to JIT | same steps | predicted / computed step | speed-up over "
        "the file without skip | the same two in `accel.trajectory` | size / plain export | `If` |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in results:
        lines.append(
            f"| {r.format} | {r.worst_error:.1e} | {r.same_sequence} | {r.step_ratio:.1%} "
            f"| {r.speedup}x | {r.told[0]:.1%}, {r.told[1]}x "
            f"| {r.size_ratio} | {'-' if r.ifs is None else r.ifs} |"
        )
    lines += [
        "",
        f"`torch.onnx.export` of the same model with diffusers' FirstBlockCache: {hooked}.",
    ]
    (output / "export.md").write_text("\n".join(lines) + "\n")
