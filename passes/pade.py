"""The Padé pass: a skip branch around the block stack of a diffusion transformer.

    stream --> [ blocks ] --> output          becomes

    stream --> cond(compute, blocks, predict) --> output
                     ^ history, times, remaining: new inputs      new outputs: residuals, signals

The rewritten graph is a pure function; whoever runs it owns the state (`StackState` says what).
The idea is TC-Padé's (arXiv 2603.02943): predict the residual of the entire stack. The branch
inside one graph, the explicit state and the default predictor are ours.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..kernels.predictors import Predictor, signals
from .base import PassResult, Program, Reason, Skip
from .blocks import Region, find_region
from .clock import Clock, find_clock
from .graphs import (
    add_placeholder,
    copy_module,
    extract,
    fake_mode,
    gather,
    hint,
    inline,
    live_ins,
    submodule_name,
    value_of,
)

__all__ = ["PadePass", "StackState", "StreamState"]

SIGNALS = 3  # finite, turn, error: see kernels.predictors.signals


@dataclass(frozen=True)
class StreamState:
    """Shape (a size may be symbolic) and type of one predicted residual."""

    shape: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class StackState:
    """The state that the pass adds to a graph.

    Extra inputs, in this order:
        compute    0-d bool on the CPU: run the blocks, or predict
        remaining  0-d float32: fraction of the run still to go
        times      float32 [history + 1, batch]: the step's own time, then the history's
        for each stream: `history` residuals, newest first, then (only if the predictor reads
            inputs) the stack's input on the previous step
    Extra outputs:
        signals    float32 [3]: see `kernels.predictors.signals`; the worst of all streams
        for each stream: the residual, then (as above) the stack's input
    """

    streams: tuple[StreamState, ...]
    batch: Any
    predictor: Predictor
    clock: Clock
    blocks: int

    @property
    def tensors_per_stream(self) -> int:
        return self.predictor.history + self.predictor.reads_inputs

    @property
    def outputs_per_stream(self) -> int:
        return 1 + self.predictor.reads_inputs

    def bytes(self) -> int:
        """Bytes of one run's state, with symbolic sizes at their hints."""
        total = 0
        for stream in self.streams:
            total += math.prod(map(hint, stream.shape)) * stream.dtype.itemsize
        return total * self.tensors_per_stream


@dataclass(frozen=True)
class PadePass:
    """Wrap the block stack in `torch.cond(compute, blocks, predict)`."""

    predictor: Predictor
    name: str = "pade"

    def run(self, program: Program) -> tuple[Program, PassResult]:
        """See the module's docstring. Declines, with reasons, where no sound region exists."""
        if program.training:
            detail = "parameters or inputs need gradients; skipping steps is for inference"
            return program, PassResult(self.name, skipped=(Skip(Reason.TRAINING, detail),))
        region, refused = find_region(program.module.graph)
        if region is None:
            return program, PassResult(self.name, skipped=tuple(refused))
        clock = find_clock(program.module.graph, region)
        if not clock.times:
            detail = (
                "no input feeds a sinusoidal embedding. A timestep given as a Python number is a "
                "constant of the graph: pass a tensor"
            )
            skips = (*refused, Skip(Reason.NO_TIMESTEP, detail))
            return program, PassResult(self.name, skipped=skips)
        state, module = self._rewrite(program, region, clock)
        stacks = ", ".join(f"{stack.parent} ({len(stack.blocks)})" for stack in region.stacks)
        details = {
            "blocks": region.blocks,
            "streams": len(region.streams),
            "nodes_skipped": len(region.nodes),
            "state_bytes": state.bytes(),
            "pairing": "additive" if all(s.additive for s in region.streams) else "same shape",
        }
        result = PassResult(self.name, (stacks,), tuple(refused), details)
        return replace(program, module=module, state=state), result

    def _rewrite(
        self, program: Program, region: Region, clock: Clock
    ) -> tuple[StackState, fx.GraphModule]:
        module, mapping = copy_module(program.module)
        graph = module.graph
        nodes = [mapping[node] for node in region.nodes]
        partners = [mapping[stream.partner] for stream in region.streams]
        outputs = [mapping[stream.output] for stream in region.streams]
        values = [value_of(node) for node in outputs]
        predictor, history = self.predictor, self.predictor.history
        fake = fake_mode(graph)

        with fake:
            # Streams that lay their samples end to end have no batch dimension to tell apart.
            sizes = {str(value.shape[0]) for value in values}
            batch = values[0].shape[0] if len(sizes) == 1 else 1
            device = values[0].device
            extra = [
                add_placeholder(module, "accel_compute", torch.ones((), dtype=torch.bool)),
                add_placeholder(module, "accel_remaining", torch.ones((), device=device)),
                add_placeholder(
                    module, "accel_times", torch.zeros(history + 1, batch, device=device)
                ),
            ]
            compute, remaining, times = extra
            residuals: list[list[fx.Node]] = []
            previous: list[fx.Node] = []
            for index, value in enumerate(values):
                residuals.append(
                    [
                        add_placeholder(module, f"accel_residual_{index}_{age}", _blank(value))
                        for age in range(history)
                    ]
                )
                if predictor.reads_inputs:
                    name = f"accel_previous_{index}"
                    previous.append(add_placeholder(module, name, _blank(value)))

        inside = set(nodes)
        first = nodes[0]
        entering = [node for node in live_ins(nodes) if node not in partners]
        # The branch is entered before the first node that reads its results, and after all that
        # it reads: everything in between that is not in the region is moved out of the way.
        gather(graph, nodes)
        # Inductor may pick another layout for a value than the one that the branch was traced
        # with; making it contiguous settles it. A contiguous value stays the same tensor.
        with graph.inserting_before(first):
            settled = {}
            for node in [*partners, *entering]:
                value = value_of(node)
                if node.op == "placeholder" or not isinstance(value, Tensor):
                    continue
                if node in partners or not value.is_contiguous():
                    settled[node] = graph.call_method("contiguous", (node,))
                    with fake:
                        settled[node].meta["example_value"] = value.contiguous()
        operands = [settled.get(node, node) for node in [*partners, *entering]]
        state_nodes = [remaining, times, *(n for each in residuals for n in each), *previous]
        operands = list(dict.fromkeys([*operands, *state_nodes]))
        for node in nodes:
            for old, new in settled.items():
                node.replace_input_with(old, new)
        partners = [settled.get(node, node) for node in partners]

        def predicted(graph: fx.Graph, mapping: dict[fx.Node, fx.Node], stream: int) -> fx.Node:
            def forecast(*flat: Tensor) -> Tensor:
                now, left, *inputs = flat[history:]
                return predictor.predict(flat[:history], now, left, inputs)

            inputs = [partners[stream], previous[stream]] if previous else []
            arguments = [*residuals[stream], times, remaining, *inputs]
            return inline(graph, forecast, [mapping[node] for node in arguments])[0]

        def blocks(graph: fx.Graph, mapping: dict[fx.Node, fx.Node]) -> list[fx.Node]:
            results = []
            for output, partner in zip(outputs, partners, strict=True):
                arguments = [mapping[output], mapping[partner]]
                results += inline(graph, _computed, arguments)
            judged = []
            for stream, residual in enumerate(results[1::2]):
                earlier = [mapping[node] for node in residuals[stream]]
                arguments = [residual, predicted(graph, mapping, stream), *earlier]
                judged += inline(
                    graph, lambda new, guess, *old: signals(new, old, guess), arguments
                )
            return [*results, *inline(graph, _worst, judged)]

        def predict(graph: fx.Graph, mapping: dict[fx.Node, fx.Node]) -> list[fx.Node]:
            results = []
            for stream, partner in enumerate(partners):
                arguments = [mapping[partner], predicted(graph, mapping, stream)]
                results += inline(graph, _filled_in(values[stream].dtype), arguments)
            return [*results, *inline(graph, _no_signals, [mapping[remaining]])]

        then, otherwise = (
            submodule_name(module, "accel_blocks"),
            submodule_name(module, "accel_predict"),
        )
        setattr(module, then, extract(module, nodes, operands, blocks))
        setattr(module, otherwise, extract(module, [], operands, predict))
        with graph.inserting_before(first):
            branch = graph.call_function(
                torch.ops.higher_order.cond,
                (compute, graph.get_attr(then), graph.get_attr(otherwise), tuple(operands)),
            )
            with fake:
                results = [_blank(value) for value in values for _ in ("output", "residual")]
                results.append(torch.zeros(SIGNALS, device=device))
            branch.meta["example_value"] = tuple(results)
            taken = []
            for index, value in enumerate(results):
                node = graph.call_function(operator.getitem, (branch, index))
                node.meta["example_value"] = value
                taken.append(node)
        new_residuals = taken[1:-1:2]
        for index, output in enumerate(outputs):
            output.replace_all_uses_with(
                taken[2 * index], delete_user_cb=lambda user: user not in inside
            )
        for node in reversed(nodes):
            graph.erase_node(node)

        result_node = graph.output_node()
        (old_results,) = result_node.args
        added: list[fx.Node] = [taken[-1]]
        for index, residual in enumerate(new_residuals):
            added.append(residual)
            if predictor.reads_inputs:
                added.append(partners[index])
        result_node.args = ((*_as_tuple(old_results), *added),)
        module.recompile()
        streams = tuple(StreamState(tuple(v.shape), v.dtype, v.device) for v in values)
        return StackState(streams, batch, predictor, clock, region.blocks), module


def _blank(value: Tensor) -> Tensor:
    """A contiguous tensor like `value`; inputs that share one would be taken for aliases."""
    return torch.empty(value.shape, dtype=value.dtype, device=value.device)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _computed(output: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
    # Both branches have to return the same strides.
    output = output.contiguous()
    return output, (output - partner).to(output.dtype)


def _filled_in(dtype: torch.dtype) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def function(partner: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return (partner + residual).to(dtype), residual.to(dtype)

    return function


def _worst(*signals: Tensor) -> Tensor:
    """The signals of all streams in one: finite only if all are; the largest turn and error."""
    if len(signals) == 1:
        return signals[0]
    together = torch.stack(signals)
    return torch.cat([together[:, :1].amin(0), together[:, 1:].amax(0)])


def _no_signals(remaining: Tensor) -> Tensor:
    return torch.stack([remaining * 0 + 1, remaining * 0, remaining * 0])
