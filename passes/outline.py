"""The outline pass: isomorphic blocks become calls of one shared subgraph.

A compiler then lowers one block instead of N, so a cold start costs a fraction. The calls are
torch's `invoke_subgraph`, which AOTAutograd and Inductor trace and compile once per subgraph, in
inference and in training. Blocks inside a skip branch are outlined too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten

from ..kernels.errors import OptionError
from .base import Feature, Pass, PassResult, Program, Reason, Skip
from .blocks import Block, find_stacks
from .graph.facts import Memory
from .graph.nodes import (
    ancestors,
    copy_module,
    descendants,
    graph_modules,
    is_model_state,
    submodule_name,
    value_of,
)
from .graph.regions import (
    extract,
    fix_floats,
    gather,
    live_ins,
    live_outs,
    operands_of,
    replace_by_call,
    settle,
    unsafe_effect,
)

__all__ = ["OutlinePass"]

FEWEST = 12  # operations of a block: to call one of fewer costs more than to compile it again


@dataclass(frozen=True)
class _Piece:
    """A block's nodes in graph order, with what crosses its border."""

    path: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def _settles(node: fx.Node) -> bool:
    """Whether an operand is a rearranged activation, which a call may copy into plain layout.

    The first block often reads such a one (a transposed convolution, say) and would otherwise
    differ from all others. An expanded value (stride 0) stays as it is: copying it costs memory.
    """
    value = value_of(node)
    if not isinstance(value, Tensor) or is_model_state(node) or node.op == "placeholder":
        return False
    return not value.is_contiguous() and 0 not in value.stride()


def _describe(node: fx.Node) -> Any:
    value = value_of(node)
    if isinstance(value, Tensor):
        parameter = isinstance(value, torch.nn.Parameter)
        strides = "plain" if _settles(node) or value.is_contiguous() else str(value.stride())
        return ("tensor", tuple(map(str, value.shape)), strides, value.dtype, str(value.device),
                value.requires_grad, parameter)  # fmt: skip
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return ("symbol", str(value))
    return ("other", type(value).__name__)


def _fingerprint(piece: _Piece) -> tuple[Any, ...]:
    """Equal for two pieces exactly if one subgraph can stand for both."""
    number = {node: index for index, node in enumerate([*piece.inputs, *piece.nodes])}

    def argument(value: Any) -> Any:
        if isinstance(value, fx.Node):
            # A subgraph stands for itself: only blocks that share it are equal.
            return ("node", number[value]) if value in number else ("module", str(value.target))
        return repr(value)

    lines = []
    for node in piece.nodes:
        flat, spec = tree_flatten((node.args, node.kwargs))
        lines.append((node.op, str(node.target), tuple(map(argument, flat)), str(spec)))
    borders = tuple(map(_describe, piece.inputs))
    return (tuple(lines), borders, tuple(number[node] for node in piece.outputs))


def _returns_input(piece: _Piece, memory: Memory) -> fx.Node | None:
    """An output that may share memory with an input, if there is one."""
    given = {number for node in piece.inputs for number in memory.of(node)}
    return next((node for node in piece.outputs if memory.of(node) & given), None)


def _longest_run(graph: fx.Graph, block: Block) -> list[fx.Node]:
    """A block's largest unbroken run of calls.

    A block's submodule may be called again after the stack (DiT's last layer borrows the first
    block's timestep embedding); that second run is not part of the block.
    """
    members = set(block.nodes)
    runs: list[list[fx.Node]] = [[]]
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        if node in members:
            runs[-1].append(node)
        elif runs[-1]:
            runs.append([])
    return max(runs, key=len)


def _piece(graph: fx.Graph, block: Block, memory: Memory) -> _Piece | Skip:
    """The part of a block that can be cut out as a function."""
    tagged = _longest_run(graph, block)
    if not tagged:
        return Skip(Reason.NOT_ISOMORPHIC, f"{block.path} computes nothing")
    inside = set(tagged)
    closed = descendants(inside) & ancestors(inside)
    stray = closed - inside
    if stray:
        names = ", ".join(sorted(node.name for node in stray)[:3])
        return Skip(
            Reason.NOT_ISOMORPHIC,
            f"{block.path} is interleaved with other code ({names})",
            min(stray).name,
        )
    effect = unsafe_effect(tagged, graph, memory)
    if effect is not None:
        return Skip(Reason.IMPURE, f"{block.path}: {effect.format_node()}", effect.name)
    nodes = tuple(tagged)
    piece = _Piece(block.path, nodes, tuple(operands_of(nodes)), tuple(live_outs(nodes)))
    for node in piece.outputs:
        if not isinstance(value_of(node), Tensor):
            return Skip(
                Reason.UNSUPPORTED_VALUE,
                f"{block.path} hands on a {type(value_of(node)).__name__}",
                node.name,
            )
    for node in piece.inputs:
        if not isinstance(value_of(node), (Tensor, torch.SymInt, int)):
            kind = type(value_of(node)).__name__
            return Skip(Reason.UNSUPPORTED_VALUE, f"{block.path} reads a {kind}", node.name)
    aliased = _returns_input(piece, memory)
    if aliased is not None:
        detail = f"{block.path} hands on a view of one of its inputs"
        return Skip(Reason.UNSUPPORTED_VALUE, detail, aliased.name)
    return piece


@dataclass(frozen=True)
class OutlinePass(Pass):
    """Replace isomorphic blocks, at least `minimum` of them, by calls of one subgraph."""

    name: ClassVar[str] = "outline"
    summary: ClassVar[str] = "compiles equal blocks once, as calls of one shared subgraph"
    applies: ClassVar[str] = "any graph with two or more equal blocks, training included"
    default: ClassVar[bool] = True
    features: ClassVar[frozenset[Feature]] = frozenset({Feature.SHARED_SUBGRAPHS})

    minimum: int = 2

    def __post_init__(self) -> None:
        if self.minimum < 2:
            raise OptionError(f"minimum is {self.minimum}; one block alone shares nothing")

    def run(self, program: Program) -> tuple[Program, PassResult]:
        """See the module's docstring. Blocks that differ stay as they are."""
        module, _ = copy_module(program.module)
        matched: list[str] = []
        skipped: list[Skip] = []
        calls = 0
        parts = list(graph_modules(module))
        for part in parts:
            # All are looked at before any is replaced: what is known of memory is then still true.
            for parent, pieces, refused in list(self._groups(part.graph)):
                skipped += refused
                for group in pieces:
                    # torch takes calls of one name for calls of one subgraph, wherever they are.
                    self._outline(part, group, submodule_name(parts, "accel_block"))
                    matched.append(f"{parent} ({len(group)} blocks)")
                    calls += len(group)
            part.recompile()
        if not matched:
            if not skipped:
                skipped.append(Skip(Reason.NO_BLOCKS, "no stack of two or more equal blocks"))
            return program, PassResult(self.name, skipped=tuple(skipped))
        details = {"calls": calls, "subgraphs": len(matched)}
        result = PassResult(self.name, tuple(matched), tuple(skipped), details)
        return replace(program, module=module), result

    def _groups(self, graph: fx.Graph) -> Iterator[tuple[str, list[list[_Piece]], list[Skip]]]:
        memory = Memory(graph)
        for stack in find_stacks(graph, memory):
            refused: list[Skip] = []
            groups: dict[tuple[Any, ...], list[_Piece]] = {}
            for block in stack.blocks:
                fix_floats(graph, block.nodes)
                piece = _piece(graph, block, memory)
                if isinstance(piece, Skip):
                    refused.append(piece)
                else:
                    groups.setdefault(_fingerprint(piece), []).append(piece)
            longest = max((len(group[0].nodes) for group in groups.values()), default=FEWEST)
            if longest < FEWEST:
                detail = f"blocks of {longest} operations: a call costs more than compiling them"
                yield stack.parent, [], [*refused, Skip(Reason.TOO_SMALL, detail)]
                continue
            kept = [group for group in groups.values() if len(group) >= self.minimum]
            lone = [group[0].path for group in groups.values() if len(group) < self.minimum]
            if lone:
                detail = f"no other block equals {', '.join(lone)}"
                refused.append(Skip(Reason.NOT_ISOMORPHIC, detail))
            yield stack.parent, kept, refused

    def _outline(self, module: fx.GraphModule, group: list[_Piece], attribute: str) -> None:
        graph, first = module.graph, group[0]
        for piece in group:
            rearranged = [node for node in live_ins(piece.nodes) if _settles(node)]
            settle(graph, piece.nodes, rearranged)
        body = extract(
            module,
            first.nodes,
            operands_of(first.nodes),
            lambda _, mapping: [mapping[n] for n in first.outputs],
        )
        setattr(module, attribute, body)
        for piece in group:
            gather(graph, piece.nodes)
            # Read again: an earlier call may have replaced what this block reads.
            operands = operands_of(piece.nodes)
            origin = piece.nodes[-1].meta.get("nn_module_stack")

            def call(operands: list[fx.Node] = operands, origin: Any = origin) -> fx.Node:
                reference = graph.get_attr(attribute)
                made = graph.call_function(
                    torch.ops.higher_order.invoke_subgraph, (reference, attribute, *operands)
                )
                made.meta["nn_module_stack"] = origin
                return made

            values = [value_of(node) for node in piece.outputs]
            replace_by_call(graph, piece.nodes, piece.outputs, call, values)
