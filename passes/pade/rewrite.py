"""The Padé pass: a skip branch around the block stack of a diffusion transformer.

    stream --> [ blocks ] --> output          becomes

    stream --> cond(compute, blocks, predict) --> output
                     ^ history, coefficients: new inputs          new outputs: residuals, moments

The rewritten graph is a pure function; whoever runs it owns the state (`StackState` says what).
The idea is TC-Padé's (arXiv 2603.02943): predict the residual of the entire stack. The branch
inside one graph, the explicit state and the default predictor are ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...kernels.predictors import MOMENTS, Predictor, moments
from ...kernels.predictors.base import reduced_dims
from ..base import Program
from ..graph.emit import add_input, inline
from ..graph.nodes import (
    copy_module,
    fake_mode,
    results_of,
    storage_of,
    submodule_name,
    value_of,
)
from ..graph.regions import extract, fix_floats, gather, operands_of, replace_by_call, settle
from .clock import Clock
from .region import Region
from .state import StackState, StreamInputs, StreamState

__all__ = ["wrap_in_branch"]


def wrap_in_branch(
    program: Program, region: Region, clock: Clock, predictor: Predictor
) -> tuple[StackState, fx.GraphModule]:
    """A module in which a region is one branch of a `cond`, and the state that this adds."""
    return _Rewrite(predictor).of(program, region, clock)


@dataclass(frozen=True)
class _Rewrite:
    predictor: Predictor

    def of(
        self, program: Program, region: Region, clock: Clock
    ) -> tuple[StackState, fx.GraphModule]:
        module, mapping = copy_module(program.module)
        graph = module.graph
        nodes = fix_floats(graph, [mapping[node] for node in region.nodes])
        fix_floats(graph, operands_of(nodes))
        outputs = [mapping[stream.output] for stream in region.streams]
        values = [value_of(node) for node in outputs]
        # Streams that lay their samples end to end have no batch dimension to tell apart.
        batch = values[0].shape[0] if len({str(value.shape[0]) for value in values}) == 1 else 1
        with fake_mode(graph):
            forms = tuple(self._stream_state(value, batch) for value in values)
        state = StackState(forms, batch, self.predictor, clock, region.blocks)
        compute, *added = [add_input(module, slot) for slot in state.inputs]
        states = state.by_stream(added)

        # The branch is entered before the first node that reads its results, and after all that
        # it reads: everything in between that is not in the region is moved out of the way.
        gather(graph, nodes)
        partners = [mapping[stream.partner] for stream in region.streams]
        entering = [node for node in operands_of(nodes) if node not in partners]
        # Inductor may pick another layout for a value than the one that the branch was traced
        # with; making it contiguous settles it. And a branch takes no two views of one tensor.
        # Two streams may have one partner.
        crossing = dict.fromkeys([*partners, *entering])
        tensors = [n for n in crossing if isinstance(value_of(n), Tensor)]
        storages = Counter(storage_of(value_of(node)) for node in tensors)
        given = [node for node in tensors if node.op == "placeholder"]
        rearranged = [
            node
            for node in tensors
            if node.op != "placeholder"
            and (
                node in partners
                or not value_of(node).is_contiguous()
                or storages[storage_of(value_of(node))] > 1
            )
        ]
        settled = settle(graph, nodes, rearranged, given)
        partners = [settled.get(node, node) for node in partners]
        operands = [*partners, *(settled.get(node, node) for node in entering)]
        operands = list(dict.fromkeys([*operands, *added]))

        streams = [_Stream(*each) for each in zip(outputs, partners, values, states, strict=True)]
        branches = (
            extract(module, nodes, operands, partial(self._blocks, streams)),
            extract(module, [], operands, partial(self._predict, streams)),
        )
        results = self._insert_branch(module, nodes, compute, operands, branches, streams)
        self._return_state(graph, results, streams)
        module.recompile()
        return state, module

    def _moments_shape(self, value: Tensor) -> tuple[Any, ...]:
        summed = reduced_dims(self.predictor.granularity, value.dim())
        kept = (1 if dim in summed else size for dim, size in enumerate(value.shape))
        return (MOMENTS, *kept)

    def _stream_state(self, value: Tensor, batch: Any) -> StreamState:
        """What the state holds of one stream. To be called under the graph's fake mode."""
        device, measured = value.device, self._moments_shape(value)
        known = self.predictor.coefficients(
            torch.zeros(self.predictor.history + 1, batch, device=device),
            torch.ones((), device=device),
            torch.zeros(measured, device=device),
        )
        coefficients = None if known is None else tuple(known.shape)
        return StreamState(tuple(value.shape), value.dtype, device, measured, coefficients)

    def _forecast(
        self, graph: fx.Graph, mapping: dict[fx.Node, fx.Node], stream: _Stream
    ) -> fx.Node:
        """Append the predictor to a branch."""
        state, history = stream.state, self.predictor.history
        optional = [] if state.coefficients is None else [state.coefficients]
        inputs = [] if state.previous is None else [stream.partner, state.previous]

        def forecast(*flat: Tensor) -> Tensor:
            rest = list(flat[history:])
            coefficients = rest.pop(0) if optional else None
            return self.predictor.predict(flat[:history], coefficients, rest)

        arguments = [*state.residuals, *optional, *inputs]
        return inline(graph, forecast, [mapping[node] for node in arguments])[0]

    def _blocks(
        self, streams: Sequence[_Stream], graph: fx.Graph, mapping: dict[fx.Node, fx.Node]
    ) -> list[fx.Node]:
        """End of the computed branch: flat outputs of all streams, flat residuals, and moments."""
        computed = [
            inline(graph, _computed, [mapping[stream.output], mapping[stream.partner]])
            for stream in streams
        ]

        def measured(actual: Tensor, predicted: Tensor, *earlier: Tensor) -> Tensor:
            return moments(actual, earlier, predicted, self.predictor.granularity)

        results = []
        for stream, (output, flat, residual) in zip(streams, computed, strict=True):
            guess = self._forecast(graph, mapping, stream)
            earlier = [mapping[node] for node in stream.state.residuals[:2]]
            results.append((output, flat, *inline(graph, measured, [residual, guess, *earlier])))
        return _by_kind(results)

    def _predict(
        self, streams: Sequence[_Stream], graph: fx.Graph, mapping: dict[fx.Node, fx.Node]
    ) -> list[fx.Node]:
        """The predicted branch, with the same results."""
        results = []
        for stream in streams:
            finish = partial(_filled_in, stream.value.dtype, self.predictor.granularity)
            arguments = [mapping[stream.partner], self._forecast(graph, mapping, stream)]
            results.append(inline(graph, finish, arguments))
        return _by_kind(results)

    def _insert_branch(
        self,
        module: fx.GraphModule,
        nodes: Sequence[fx.Node],
        compute: fx.Node,
        operands: Sequence[fx.Node],
        branches: tuple[fx.GraphModule, fx.GraphModule],
        streams: Sequence[_Stream],
    ) -> list[fx.Node]:
        """Put the branch in the place of `nodes`; its results, by kind as branches return them."""
        graph = module.graph
        names = (
            submodule_name([module], "accel_blocks"),
            submodule_name([module], "accel_predict"),
        )
        for name, branch in zip(names, branches, strict=True):
            setattr(module, name, branch)

        def call() -> fx.Node:
            references = [graph.get_attr(name) for name in names]
            return graph.call_function(
                torch.ops.higher_order.cond, (compute, *references, tuple(operands))
            )

        with fake_mode(graph):
            flat = [_blank(stream.value).flatten() for stream in [*streams, *streams]]
            measured = [
                torch.zeros(self._moments_shape(stream.value), device=stream.value.device)
                for stream in streams
            ]
        outputs = [stream.output for stream in streams]
        partners = [stream.partner for stream in streams]
        values = [*flat, *measured]
        return replace_by_call(graph, nodes, outputs, call, values, [*partners, *partners])

    def _return_state(
        self, graph: fx.Graph, results: Sequence[fx.Node], streams: Sequence[_Stream]
    ) -> None:
        """Append the new state to the graph's results."""
        result_node = graph.output_node()
        count = len(streams)
        added: list[fx.Node] = []
        for index, stream in enumerate(streams):
            added += [results[2 * count + index], results[count + index]]
            if self.predictor.reads_inputs:
                added.append(stream.partner)
        result_node.args = ((*results_of(graph), *added),)


def _by_kind(streams: Sequence[Sequence[fx.Node]]) -> list[fx.Node]:
    """The results of all streams: first all outputs, then all residuals, then all moments."""
    return [result for kind in zip(*streams, strict=True) for result in kind]


@dataclass(frozen=True)
class _Stream:
    """What a rewrite needs of one stream: nodes of the new graph, and the output's fake value."""

    output: fx.Node
    partner: fx.Node
    value: Tensor
    state: StreamInputs


def _blank(value: Tensor) -> Tensor:
    """A contiguous tensor like `value`; inputs that share one would be taken for aliases."""
    return torch.empty(value.shape, dtype=value.dtype, device=value.device)


def _computed(output: Tensor, partner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Both branches have to return the same layout, and torch has to see that they do. Flattened,
    # there are no strides to compare, which it can't where a size is a product of symbols. A slice
    # of a batch of one is contiguous, yet begins somewhere in another tensor's memory.
    output = output.contiguous()
    if not statically_known_true(output.storage_offset() == 0):
        output = output.clone(memory_format=torch.contiguous_format)
    residual = (output - partner).to(output.dtype)
    return output.flatten(), residual.flatten(), residual


def _filled_in(
    dtype: torch.dtype, granularity: str, partner: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    # Only the shape of this sum is used; sizes may be symbols, which can't be written down here.
    one = partner.float().sum(reduced_dims(granularity, partner.dim()), keepdim=True)
    no_moments = torch.stack([torch.zeros_like(one)] * MOMENTS)
    return (partner + residual).to(dtype).flatten(), residual.to(dtype).flatten(), no_moments
