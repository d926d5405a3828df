"""What accel says about a model: `explain` before, `stats` after."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.errors import AccelError, OptionError, first_line
from ..kernels.omnisparse.selection import SelectionSummary
from ..passes import PASSES, PadePass, PassResult, Skip
from ..passes.pade.schedule import Auto
from .backend import compiled_graphs, is_whole
from .capture import captured, not_whole
from .export.engine import Engine
from .lowering.partitions import partitions
from .lowering.table import CANNOT
from .models.schedulers import check_steps, weights_of
from .options import Options, parse_options
from .pipeline import rewrite
from .runtime.kept import COUNTED, state_bytes
from .runtime.sampling import graphs_of
from .runtime.steps import Root
from .runtime.tables import drop_tables
from .runtime.trajectory import Explicit, enclosing, enter_explicit
from .stats import Stats

__all__ = ["GraphReport", "PassReport", "Report", "Stats", "explain", "owners_of", "refresh",
           "report_of", "stats", "trajectory"]  # fmt: skip


@dataclass(frozen=True)
class GraphReport:
    """One captured graph: the calls in it before, and what each pass did.

    partitions: what would be handed to TensorRT, where that is asked for.
    """

    calls: int
    results: tuple[PassResult, ...]
    partitions: tuple[str, ...] = ()


@dataclass(frozen=True)
class PassReport:
    """One pass over all graphs of a model. seconds: that it took, verification included."""

    name: str
    matched: tuple[str, ...]
    skipped: tuple[Skip, ...]
    details: tuple[dict[str, Any], ...]
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """What the backend does with a model. `print` it, or read its fields."""

    graphs: tuple[GraphReport, ...]
    options: Options
    fullgraph: bool  # whether the model is captured as one graph
    broken: str = ""  # what Dynamo said where it is not; known to `explain`

    @property
    def passes(self) -> dict[str, PassReport]:
        """An entry for every pass, also where nothing matched."""
        reports = {}
        for name in (kind.name for kind in PASSES):
            results = [r for graph in self.graphs for r in graph.results if r.name == name]
            reports[name] = PassReport(
                name,
                tuple(match for result in results for match in result.matched),
                tuple(skip for result in results for skip in result.skipped),
                tuple(result.details for result in results if result.details),
                sum(result.seconds for result in results),
            )
        return reports

    def __str__(self) -> str:
        lines = [
            "captured whole (fullgraph=True)"
            + (f", compiled {len(self.graphs)} times" if len(self.graphs) > 1 else "")
            if self.fullgraph
            else f"captured in parts, {len(self.graphs)} graphs: "
            + (
                f"torch.compile can't capture this model as one: {self.broken}"
                if self.broken
                else "torch.compile can't capture this model as one (accel.explain says why), "
                "or it is also part of another that is compiled"
            )
        ]
        for name, report in self.passes.items():
            found = "matched " + "; ".join(report.matched) if report.matched else "nothing"
            took = f" ({1000 * report.seconds:.0f} ms)" if report.seconds else ""
            lines.append(f"{name}: {found}{took}")
            for detail in report.details:
                lines.append("  " + ", ".join(f"{key} {value}" for key, value in detail.items()))
            if name == "pade" and report.matched:
                lines.append("  " + self._saving())
            lines += dict.fromkeys(f"  not applied: {skip}" for skip in report.skipped)
        for graph in self.graphs:
            if graph.partitions:
                lines.append(f"for TensorRT: {', '.join(graph.partitions)}")
        return "\n".join(lines)

    def _saving(self) -> str:
        pade = self.options.of(PadePass)
        assert pade is not None
        schedule = pade.plan()
        if not isinstance(schedule, Auto):
            return f"schedule {pade.schedule}"
        placed = schedule.placed(20)
        few = schedule.placed(4)
        return (
            f"of 20 steps computes {len(placed)} ({', '.join(map(str, placed))}): at most "
            f"{20 / len(placed):.2f}x faster; of 4 steps {len(few)}"
            + (": nothing to gain there" if len(few) == 4 else "")
        )


def explain(
    model: Any,
    *args: Any,
    options: Options | Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """What `torch.compile(model, backend="accel", options=options)` would do, and why.

    Captures the model on the given inputs (which runs it once, uncompiled) and applies the passes
    without compiling anything. Call it under `torch.no_grad()` for an inference graph.
    """
    parsed = parse_options(options)
    graphs: list[GraphReport] = []

    def collect(module: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        program, results = rewrite(module, parsed, CANNOT.get(parsed.lowering))
        calls = sum(node.op.startswith("call") for node in module.graph.nodes)
        parts = partitions(program.module) if parsed.lowering == "tensorrt" else []
        graphs.append(GraphReport(calls, results, tuple(map(str, parts))))
        return module.forward

    original = getattr(model, "_orig_mod", model)
    broken = ""
    try:
        captured(original, collect)(*args, **kwargs)
    except not_whole() as error:
        broken = first_line(error)
        graphs.clear()
        captured(original, collect, whole=False)(*args, **kwargs)
    return Report(tuple(graphs), parsed, not broken, broken)


def report_of(compiled: Any) -> Report:
    """The report of a compiled model's graphs as they were really compiled, so far."""
    if isinstance(compiled, Engine):
        raise AccelError("what the passes did to an engine is in engine.manifest.passes")
    owners = owners_of(compiled)
    if not owners:
        raise AccelError(
            "the model has no parameters, by which its graphs are found; use accel.explain"
        )
    graphs = sorted(compiled_graphs(owners), key=lambda graph: graph.number)
    if not graphs:
        raise AccelError(
            "the model has no graph compiled by accel yet; call it once, or use accel.explain"
        )
    reports = tuple(GraphReport(graph.calls, graph.results) for graph in graphs)
    return Report(reports, graphs[0].options, is_whole(graphs))


def owners_of(compiled: Any) -> frozenset[int]:
    """The ids by which the graphs of a compiled model, or of an engine, are found."""
    if isinstance(compiled, Engine):
        return frozenset() if compiled.graph is None else frozenset({id(compiled.graph)})
    if not isinstance(compiled, torch.nn.Module):
        raise AccelError(
            f"expected a compiled torch.nn.Module, got {type(compiled).__name__}; pass the model "
            "that torch.compile returned, or an engine"
        )
    tensors = [*compiled.parameters(), *compiled.buffers()]
    return frozenset(map(id, tensors))


def stats(compiled: Any) -> Stats:
    """Counters of a model compiled with `backend="accel"` (the module will do), or an engine's."""
    owners = owners_of(compiled)
    graphs = compiled_graphs(owners)
    records = graphs_of(owners)
    counters = [model.counters for _, model in records]
    runs = [model.runs for _, model in records]

    def total(name: str) -> int:
        return sum(getattr(counter, name) for counter in counters)

    def by_why(name: str) -> dict[str, int]:
        return dict(sum((Counter(getattr(each, name)) for each in counters), Counter()))

    roots = by_why("roots")
    return Stats(
        **{name: total(name) for name in COUNTED},
        uncalibrated=by_why("uncalibrated"),
        runs=sum(each.counts.started for each in runs),
        forks=sum(each.counts.forks for each in runs),
        siblings=sum(each.counts.siblings for each in runs),
        roots=roots,
        unmatched_calls=roots.get(Root.CONDITIONS, 0),
        largest_accepted=max((each.counts.largest_accepted for each in runs), default=0.0),
        smallest_refused=min((each.counts.smallest_refused for each in runs), default=math.inf),
        recompiles=len(graphs) - len({graph.frame for graph in graphs}),
        state_bytes=sum(state_bytes(each) for each in runs),
        last_error=counters[-1].last_error if counters else float("nan"),
        attention=tuple(
            SelectionSummary.of(*each) for graph in graphs for each in graph.selections
        ),
    )


def refresh(compiled: Any) -> None:
    """Have what a compiled model keeps of its weights computed again at the next call.

    These are the codebook pass's tables and fused projections. Needed only after a change that a
    call can't see by itself at once, which is one made past torch's count (through `.data`, numpy,
    a fused operation called directly, or to tensors made in inference mode) to little of a weight:

    - A call notices at once: weights that are other tensors or lie elsewhere (`assign=True`,
      `.data =`, `.to`), whatever torch counts (operations in place, `load_state_dict`), a step of
      any `torch.optim.Optimizer`, fused or compiled.
    - On a CPU it also notices at once a change past torch's count that reaches one of 16 spots,
      spread evenly over each weight: as merging, averaging and loading do. One that misses them
      all, of a few rows of a large table, say, is found later, as every eighth call compares the
      next 32 KiB to the bit: at the latest after eight calls for each 32 KiB of each weight.
    - On other devices only the spots are compared, and nothing waits for that: a change is found
      one call later, or when the device has come to it. What misses the spots is not found.

    compiled: what `torch.compile` returned, the module, or one that contains it. Raises AccelError
    for an engine, which has its weights in its file, and for a model without parameters.
    """
    if isinstance(compiled, Engine):
        raise AccelError("an engine keeps the weights that it was exported with; export it again")
    owners = owners_of(compiled)
    if not owners:
        raise AccelError("the model has no parameters or buffers, by which its graphs are found")
    drop_tables(owners)


@contextlib.contextmanager
def trajectory(
    compiled: Any, steps: int | None = None, branch: str | None = None, scheduler: Any = None
) -> Iterator[None]:
    """One sampling run of a compiled model, or one branch of it, made explicit.

    Within it the caller's word counts, not what the samples prove: each new sample is the run's
    next step. Its state starts empty and is freed at the end; other runs are neither seen nor
    touched, in this thread or any other. So samplers that add noise, whose steps nothing can prove,
    skip too.

    steps: how many, if known: then the schedule need not estimate it. branch: a name for calls that
    belong together, such as "cond"; inside another `trajectory` of the model, of that run. Without
    it branches are told apart by what the model is given besides sample and time. scheduler: one of
    diffusers', set to the run's timesteps: says how many steps there are, and what it makes of the
    model's outputs; else that is read off the samples.
    Raises OptionError if the schedule or the scheduler does not fit that many steps, or a branch is
    of no run.
    """
    owners = owners_of(compiled)
    weights = None
    if scheduler is not None:
        steps = check_steps(scheduler, steps)
        weights = weights_of(scheduler)
    if steps is not None and steps < 1:
        raise OptionError(f"steps is {steps}; a run has at least one step")
    if branch is not None and steps is None and enclosing(owners) is None:
        raise OptionError(
            f"branch {branch!r} is of no run: say how many steps it has, or open it inside "
            "`with accel.trajectory(model, steps=...)`"
        )
    for graph, _ in graphs_of(owners):
        if steps is not None:
            graph.schedule.check(steps)
    with enter_explicit(Explicit(owners, steps, weights, branch)):
        yield
