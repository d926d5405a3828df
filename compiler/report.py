"""What accel says about a model: `explain` before, `stats` after."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.errors import AccelError, OptionError
from ..kernels.omnisparse.selection import SelectionSummary
from ..passes import PASSES, PassResult, Skip
from .backend import compiled_graphs
from .export.engine import Engine
from .lowering import LEFT_OUT
from .options import Options, parse_options
from .partitions import partitions
from .pipeline import rewrite
from .runtime import graphs_of
from .schedule import Auto
from .trajectory import Explicit, enter_explicit

__all__ = ["GraphReport", "PassReport", "Report", "Stats", "explain", "report_of", "stats",
           "trajectory"]  # fmt: skip


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
    """One pass over all graphs of a model."""

    name: str
    matched: tuple[str, ...]
    skipped: tuple[Skip, ...]
    details: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Report:
    """What the backend does with a model. `print` it, or read its fields."""

    graphs: tuple[GraphReport, ...]
    options: Options
    fullgraph: bool  # whether the model is captured as one graph

    @property
    def passes(self) -> dict[str, PassReport]:
        """An entry for every pass, also where nothing matched."""
        reports = {}
        for name in PASSES:
            results = [r for graph in self.graphs for r in graph.results if r.name == name]
            reports[name] = PassReport(
                name,
                tuple(match for result in results for match in result.matched),
                tuple(skip for result in results for skip in result.skipped),
                tuple(result.details for result in results if result.details),
            )
        return reports

    def __str__(self) -> str:
        lines = [
            "captured whole (fullgraph=True)"
            + (f", compiled {len(self.graphs)} times" if len(self.graphs) > 1 else "")
            if self.fullgraph
            else f"{len(self.graphs)} graphs: torch.compile can't capture this model as one, or it "
            "is also part of another that is compiled"
        ]
        for name, report in self.passes.items():
            lines.append(
                f"{name}: {'matched ' + '; '.join(report.matched) if report.matched else 'nothing'}"
            )
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
        pade = self.options.pade_options
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
        program, results = rewrite(module, parsed, LEFT_OUT.get(parsed.lowering))
        calls = sum(node.op.startswith("call") for node in module.graph.nodes)
        parts = partitions(program.module) if parsed.lowering == "tensorrt" else []
        graphs.append(GraphReport(calls, results, tuple(map(str, parts))))
        return module.forward

    original = getattr(model, "_orig_mod", model)
    one_graph = True
    try:
        torch.compile(original, backend=collect, fullgraph=True)(*args, **kwargs)
    except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError):  # such as sizes in data
        one_graph = False
        graphs.clear()
        torch.compile(original, backend=collect)(*args, **kwargs)
    return Report(tuple(graphs), parsed, one_graph)


def report_of(compiled: Any) -> Report:
    """The report of a compiled model's graphs as they were really compiled, so far."""
    if isinstance(compiled, Engine):
        raise AccelError("what the passes did to an engine is in engine.manifest.passes")
    owners = _owners(compiled)
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
    return Report(reports, graphs[0].options, len({graph.frame for graph in graphs}) == 1)


@dataclass(frozen=True)
class Stats:
    """What a compiled model has done so far.

    full_steps, predicted_steps: calls that ran the blocks, and that predicted instead.
    repeated_steps: calls with exactly the inputs of the one before.
    untrusted_steps: computed because the history was not finite or the error above `max_error`.
    gated_steps: computed because the gate said so.
    nonfinite_steps: computed steps with NaN or Inf in the residual; kept out of the history.
    runs: sampling runs begun. unmatched_calls: calls that looked like no known run although their
        conditions were known; each began a run of its own.
    recompiles: graphs compiled again for other shapes or settings (not those of a graph break).
    state_bytes: held now.
    last_error: relative error that the prediction would have had at the last computed step.
    attention: what each sparse attention selected, in the last call of each graph.
    """

    full_steps: int = 0
    predicted_steps: int = 0
    repeated_steps: int = 0
    untrusted_steps: int = 0
    gated_steps: int = 0
    nonfinite_steps: int = 0
    runs: int = 0
    unmatched_calls: int = 0
    recompiles: int = 0
    state_bytes: int = 0
    last_error: float = float("nan")
    attention: tuple[SelectionSummary, ...] = ()


def _owners(compiled: Any) -> frozenset[int]:
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
    owners = _owners(compiled)
    graphs = compiled_graphs(owners)
    records = graphs_of(owners)
    counters = [model.counters for _, model in records]
    runs = [model.runs for _, model in records]

    def total(name: str) -> int:
        return sum(getattr(counter, name) for counter in counters)

    return Stats(
        full_steps=total("full_steps"),
        predicted_steps=total("predicted_steps"),
        repeated_steps=total("repeated_steps"),
        untrusted_steps=total("untrusted_steps"),
        gated_steps=total("gated_steps"),
        nonfinite_steps=total("nonfinite_steps"),
        runs=sum(each.started for each in runs),
        unmatched_calls=sum(each.unmatched for each in runs),
        recompiles=len(graphs) - len({graph.frame for graph in graphs}),
        state_bytes=sum(each.bytes() for each in runs),
        last_error=counters[-1].last_error if counters else float("nan"),
        attention=tuple(
            SelectionSummary.of(*each) for graph in graphs for each in graph.selections
        ),
    )


@contextlib.contextmanager
def trajectory(compiled: Any, steps: int | None = None) -> Iterator[None]:
    """One sampling run of a compiled model, made explicit.

    Its state starts empty and is freed at the end; other runs are neither seen nor touched, in
    this thread or any other. steps: how many, if known: then the schedule need not estimate it.
    Raises OptionError if the schedule does not fit that many steps.
    """
    owners = _owners(compiled)
    if steps is not None and steps < 1:
        raise OptionError(f"steps is {steps}; a run has at least one step")
    for graph, _ in graphs_of(owners):
        if steps is not None:
            graph.schedule.check(steps)
    with enter_explicit(Explicit(owners, steps)):
        yield
