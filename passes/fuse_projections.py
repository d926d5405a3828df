"""Linear layers that read one value become one: query, key and value, or gate and up. Before:

    query = linear(x, query_weight, query_bias)
    key = linear(x, key_weight)
    value = linear(x, value_weight, value_bias)

After, where the weight and the bias are functions of the model's weights alone:

    query, key, value = split(linear(x, weight, bias), sizes)

The results are copies, not views, so that their layout and memory are what they were; a compiler
computes what follows from the product itself. The fused weights are there beside the model's own.

Off unless asked for, as it does not pay where it was measured: a block of a language model in
float32, of width 256 or 768, runs 0.94 to 1.02 times as fast with it on a CPU core, for 1 to 1024
tokens (`python -m accel.examples.projections`). The same weights are read either way, and to find
out whether they have changed takes 8 microseconds a call. It leaves fewer calls of kernels, which
may pay where these are short and costly to start; that was not measured.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..kernels.errors import OptionError
from .base import Constants, Feature, Pass, PassResult, Program, Reason, Skip, Slot
from .blocks import find_stacks, where_of
from .graph.emit import add_input, emit
from .graph.nodes import copy_module, is_model_state, value_of

__all__ = ["FuseProjectionsPass"]


@dataclass(frozen=True)
class _Projection:
    """A call `linear(input, weight, bias)`."""

    node: fx.Node
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None

    @property
    def size(self) -> int:
        """Of each result's last dimension."""
        return int(value_of(self.weight).shape[0])

    @property
    def parameters(self) -> list[fx.Node]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]


Group = list[_Projection]


@dataclass(frozen=True)
class FuseProjectionsPass(Pass):
    """Compute linear layers of one value by one product, where a block has `minimum` of them.

    weight_bytes: that all fused weights together may take. Where they would take more, nothing is
    fused, so that equal blocks stay equal.
    """

    name: ClassVar[str] = "fuse_projections"
    summary: ClassVar[str] = "linear layers that read one value become one product of matrices"
    applies: ClassVar[str] = (
        "when asked for: inference graphs with query, key and value, or gate and up projections"
    )
    keeps: ClassVar[str] = "fused weights, computed again when a weight changes"
    features: ClassVar[frozenset[Feature]] = frozenset({Feature.CONSTANTS})

    minimum: int = 2
    weight_bytes: int = 2**28

    def __post_init__(self) -> None:
        if self.minimum < 2:
            raise OptionError(f"minimum is {self.minimum}; it takes two layers or more")
        if self.weight_bytes < 1:
            raise OptionError(f"weight_bytes is {self.weight_bytes}; it has to be above 0")

    def run(self, program: Program) -> tuple[Program, PassResult]:
        """Fuse all that can be fused, or nothing where that takes too many bytes."""
        if program.training:
            return self._declined(
                program, Skip(Reason.TRAINING, "the fused weights would change every step")
            )
        groups, skipped = self._groups(program)
        if not groups:
            detail = f"no value is read by {self.minimum} linear layers of one block"
            return self._declined(program, *(skipped or [Skip(Reason.NO_PROJECTIONS, detail)]))
        most = sum(map(_bytes, groups))
        if most > self.weight_bytes:
            detail = f"the fused weights take {most} bytes, more than {self.weight_bytes}"
            return self._declined(program, *skipped, Skip(Reason.TOO_LARGE, detail))
        matched = tuple(f"{where_of(group[0].node)}: {len(group)} layers" for group in groups)
        module, mapping = copy_module(program.module)
        added = _fuse(module, [[_copied(each, mapping) for each in group] for group in groups])
        module.recompile()
        details = {
            "linear layers": f"{len(groups)} instead of {sum(map(len, groups))}",
            "weight bytes": most,
        }
        result = PassResult(self.name, matched, tuple(skipped), details)
        return dataclasses.replace(program, module=module, added=(*program.added, added)), result

    def _declined(self, program: Program, *skipped: Skip) -> tuple[Program, PassResult]:
        return program, PassResult(self.name, skipped=skipped)

    def _groups(self, program: Program) -> tuple[list[Group], list[Skip]]:
        """What can be fused, and why what is alike can't."""
        groups, skipped = [], []
        for candidates in _by_value(program):
            if len(candidates) < self.minimum:
                continue
            fitting: dict[Any, Group] = {}
            for each in candidates:
                refused = _refused(each, program)
                if refused is None:
                    weight = value_of(each.weight)
                    fitting.setdefault((weight.dtype, weight.device), []).append(each)
                else:
                    skipped.append(refused)
            for group in fitting.values():
                effect = _effect_between(group, program)
                if len(group) < self.minimum:
                    detail = f"{len(group)} of {len(candidates)} layers of one value can be fused"
                    skipped.append(Skip(Reason.NO_PROJECTIONS, detail, where_of(group[0].node)))
                elif effect is not None:
                    skipped.append(effect)
                else:
                    groups.append(group)
        return groups, skipped


def _by_value(program: Program) -> Iterator[Group]:
    """Linear layers by the value that they read, within a block.

    What all blocks compute from one value, such as keys of a prompt, is not taken together: a block
    would compute it for all others, and be unlike them. A list of layers is no stack of blocks.
    """
    graph = program.module.graph
    block = {
        node: each.path
        for stack in find_stacks(graph, program.memory)
        for each in stack.blocks
        if sum(node.op.startswith("call") for node in each.nodes) > 1
        for node in each.nodes
    }
    found: dict[tuple[fx.Node, str | None], Group] = {}
    for node in graph.find_nodes(op="call_function", target=linear):
        names = ("input", "weight", "bias")
        given: Any = dict(zip(names, node.args, strict=False)) | node.kwargs
        each = _Projection(node, given["input"], given["weight"], given.get("bias"))
        found.setdefault((each.input, block.get(node)), []).append(each)
    yield from found.values()


def _refused(each: _Projection, program: Program) -> Skip | None:
    """Why a layer can't be fused with any other, if so."""
    graph, memory = program.module.graph, program.memory
    where = where_of(each.node)
    own = set(graph.find_nodes(op="placeholder")[: _own_inputs(program)])
    for node in each.parameters:
        if node not in own or not is_model_state(node):
            return Skip(Reason.NO_PROJECTIONS, f"{node.name} is no weight of the model", where)
        if is_traceable_wrapper_subclass(value_of(node)):
            kind = type(value_of(node)).__name__
            return Skip(Reason.NO_PROJECTIONS, f"{node.name} is a {kind}", where)
        writer = next((n for n in memory.writers if memory.written_by(n) & memory.of(node)), None)
        if writer is not None:
            return Skip(Reason.IMPURE, f"{writer.name} may write to {node.name}", where)
    acts = memory.facts_of(each.node).acts
    if acts:
        return Skip(Reason.IMPURE, acts, where)
    input, weight, made = value_of(each.input), value_of(each.weight), value_of(each.node)
    if weight.dim() != 2 or not all(isinstance(size, int) for size in weight.shape):
        detail = f"its weight is of {list(weight.shape)}; needed are two known sizes"
        return Skip(Reason.NO_PROJECTIONS, detail, where)
    if each.bias is not None and tuple(value_of(each.bias).shape) != (each.size,):
        detail = f"its bias is of {list(value_of(each.bias).shape)}, not [{each.size}]"
        return Skip(Reason.NO_PROJECTIONS, detail, where)
    types = {value.dtype for value in (input, made, *map(value_of, each.parameters))}
    if len(types) > 1:
        named = ", ".join(sorted(map(str, types)))
        return Skip(Reason.NO_PROJECTIONS, f"autocast is on: it mixes {named}", where)
    if not made.is_contiguous():
        return Skip(Reason.NO_PROJECTIONS, "its result is not in plain layout", where)
    return None


def _own_inputs(program: Program) -> int:
    """How many of a program's inputs are the caller's."""
    given = len(program.module.graph.find_nodes(op="placeholder"))
    return given - sum(len(each.inputs) for each in program.added)


def _effect_between(group: Group, program: Program) -> Skip | None:
    """What forbids to compute all of a group where the first of it is, if anything does."""
    memory = program.memory
    read = memory.of(group[0].input)
    node = group[0].node
    while node is not group[-1].node:
        node = node.next
        acts = memory.facts_of(node).acts
        if acts or memory.written_by(node) & read:
            does = acts or "it may write to their input"
            detail = f"{node.name} is between layers of one value: {does}"
            return Skip(Reason.IMPURE, detail, where_of(group[0].node))
    return None


def _copied(each: _Projection, mapping: dict[fx.Node, fx.Node]) -> _Projection:
    bias = None if each.bias is None else mapping[each.bias]
    return _Projection(mapping[each.node], mapping[each.input], mapping[each.weight], bias)


def _has_bias(group: Group) -> bool:
    return any(each.bias is not None for each in group)


def _bytes(group: Group) -> int:
    """Of a group's fused weight and bias."""
    weight = value_of(group[0].weight)
    rows = sum(each.size for each in group)
    return int(rows * (weight.shape[1] + _has_bias(group)) * weight.element_size())


# Rewriting


def _fuse(module: fx.GraphModule, groups: Sequence[Group]) -> Constants:
    """Compute each group by one layer, with a weight and perhaps a bias that are new inputs."""
    given = module.graph.find_nodes(op="placeholder")
    read = {node for group in groups for each in group for node in each.parameters}
    sources = [node for node in given if node in read]
    number = {node: index for index, node in enumerate(sources)}
    plan, slots = [], []
    for index, group in enumerate(groups):
        weights = tuple(number[each.weight] for each in group)
        biases = tuple(None if each.bias is None else number[each.bias] for each in group)
        plan.append((weights, biases))
        rows, value = sum(each.size for each in group), value_of(group[0].weight)
        shapes: dict[str, tuple[int, ...]] = {"weight": (rows, value.shape[1])}
        if _has_bias(group):
            shapes["bias"] = (rows,)
        own = [
            Slot(f"fused_{name}_{index}", shape, value.dtype, value.device)
            for name, shape in shapes.items()
        ]
        slots += own
        _replace(group, [_add_weight(module, slot) for slot in own])
    places = tuple(given.index(node) for node in sources)
    return Constants(_Concatenated(plan), places, tuple(slots))


def _add_weight(module: fx.GraphModule, slot: Slot) -> fx.Node:
    node = add_input(module, slot)
    node.meta["accel_model_state"] = True
    return node


def _replace(group: Group, parameters: Sequence[fx.Node]) -> None:
    """Put one layer in the place of the first of a group, and its parts in the place of all."""
    graph, first = group[0].node.graph, group[0]
    sizes = [each.size for each in group]
    with graph.inserting_before(first.node):
        product = emit(graph, linear, first.input, *parameters, like=first.node)
        parts = emit(graph, _split, product, sizes, like=first.node)
        for index, each in enumerate(group):
            part = emit(graph, operator.getitem, parts, index, like=each.node)
            each.node.replace_all_uses_with(part)
    for each in group:
        graph.erase_node(each.node)


def _split(product: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Copies of its parts, in plain layout. (torch 2.13 can't run `split_with_sizes_copy` on fake
    values of symbolic sizes.)"""
    parts = product.split(list(sizes), -1)
    return tuple(each.clone(memory_format=torch.contiguous_format) for each in parts)


class _Concatenated(nn.Module):
    """From the tensors that they are made of to fused weights and biases.

    plan: of each group where its weights are among these tensors, and its biases; None for a bias
    that a layer lacks, which is zeros where another of its group has one.
    """

    def __init__(self, plan: Sequence[tuple[Sequence[int], Sequence[int | None]]]) -> None:
        super().__init__()
        self.plan = plan

    def forward(self, *sources: Tensor) -> tuple[Tensor, ...]:
        made = []
        for weights, biases in self.plan:
            rows = [sources[place] for place in weights]
            made.append(torch.cat(rows))
            if any(place is not None for place in biases):
                pairs = zip(rows, biases, strict=True)
                made.append(
                    torch.cat(
                        [
                            weight.new_zeros(len(weight)) if place is None else sources[place]
                            for weight, place in pairs
                        ]
                    )
                )
        return tuple(made)
