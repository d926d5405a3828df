"""Finding, in a captured graph, the inputs that say where in a sampling run a call belongs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ..graph.nodes import ancestors, call_name, is_model_state, results_of, value_of
from .region import Region

__all__ = ["Clock", "find_clock"]

# What may stand between a timestep and the sine of its embedding, and between that and a layer.
_BEFORE_SINE = {
    "mul", "truediv", "div", "add", "sub", "neg", "log", "getitem", "to", "float", "double", "half",
    "bfloat16", "type_as", "unsqueeze", "expand", "expand_as", "reshape", "view", "flatten",
    "ger", "outer", "einsum", "matmul", "clone", "contiguous", "repeat", "repeat_interleave",
    "tensor", "full", "as_tensor", "squeeze", "clamp", "rsub", "multiply", "imul", "ones",
    "broadcast_to", "cat", "stack", "ones_like", "full_like", "pow",
}  # fmt: skip
_AFTER_SINE = {
    "cat", "concat", "stack", "to", "type_as", "getitem", "float", "half", "bfloat16", "flatten",
    "reshape", "view", "unsqueeze", "squeeze", "flip", "mul", "pad", "contiguous", "expand",
    "unflatten", "repeat",
}  # fmt: skip
_LAYERS = {"linear", "addmm", "matmul", "conv1d", "conv2d"}


@dataclass(frozen=True)
class Clock:
    """Positions of inputs among the graph's placeholders.

    times: inputs that feed a sinusoidal embedding followed by a layer (the timestep; a guidance
        scale is embedded the same way and shows itself by never changing).
    latents: the noisy sample(s). answers: the number of the result that looks like each; the next
        sample is made of both.
    conditions: all other tensors from the caller (prompts, labels, masks), numbers that are no
        sizes, and tensors that the model holds without their being parameters.
    """

    times: tuple[int, ...]
    latents: tuple[int, ...]
    answers: tuple[int, ...]
    conditions: tuple[int, ...]


def _reaches_layer(sine: fx.Node) -> bool:
    seen, todo = set(), [sine]
    while todo:
        node = todo.pop()
        for user in node.users:
            if user in seen or user.op not in ("call_function", "call_method"):
                continue
            seen.add(user)
            if call_name(user) in _LAYERS and user.args and user.args[0] is node:
                return True
            if call_name(user) in _AFTER_SINE:
                todo.append(user)
    return False


def _may_be_time(value: torch.Tensor) -> bool:
    """Whether a tensor has the shape of times: a few numbers for each sample, or one for each frame
    or place, without channels."""
    return value.dim() <= 3 or (isinstance(value.shape[1], int) and value.shape[1] == 1)


def _embedded_inputs(sine: fx.Node) -> set[fx.Node]:
    found, seen, todo = set(), set(), list(sine.all_input_nodes)
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder" and not is_model_state(node):
            value = value_of(node)
            scalar = isinstance(value, (torch.SymInt, torch.SymFloat, int, float))
            if scalar or (isinstance(value, torch.Tensor) and _may_be_time(value)):
                found.add(node)
        elif call_name(node) in _BEFORE_SINE:
            todo.extend(node.all_input_nodes)
    return found


def _shape_symbols(placeholders: Sequence[fx.Node]) -> set[fx.Node]:
    """Integer inputs that are sizes of tensor inputs, not values of their own."""
    sizes = set()
    for node in placeholders:
        value = value_of(node)
        if isinstance(value, torch.Tensor):
            sizes |= {str(size) for size in value.shape if isinstance(size, torch.SymInt)}
    return {
        node
        for node in placeholders
        if isinstance(value_of(node), torch.SymInt) and str(value_of(node)) in sizes
    }


def _likeness(shape: torch.Size, output: torch.Size) -> int:
    """How much a shape resembles an output's: 0 for another number of dimensions."""
    if len(shape) != len(output):
        return 0
    return 1 + sum(str(a) == str(b) for a, b in zip(shape, output, strict=True))


def find_clock(graph: fx.Graph, region: Region) -> Clock:
    """The clock of a graph whose block stack is `region`. `times` is empty if there is none."""
    placeholders = graph.find_nodes(op="placeholder")
    sizes = _shape_symbols(placeholders)
    timed: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op in ("call_function", "call_method") and call_name(node) in ("sin", "cos"):
            inputs = _embedded_inputs(node) - sizes
            if inputs and _reaches_layer(node):
                timed |= inputs

    def is_tensor(node: fx.Node) -> bool:
        return isinstance(value_of(node), torch.Tensor) and not is_model_state(node)

    def tells(node: fx.Node) -> bool:
        """Whether what it holds may tell calls apart."""
        value = value_of(node)
        if isinstance(value, torch.Tensor):
            return not isinstance(value, torch.nn.Parameter) or not is_model_state(node)
        return isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))

    origin = ancestors([stream.partner for stream in region.streams])
    entering = [
        node
        for node in placeholders
        if node in origin
        and node not in timed
        and is_tensor(node)
        and value_of(node).is_floating_point()
    ]
    # Where text is joined to the sample before the blocks, both are ancestors of a stream. The
    # sample is what looks most like an output of the model (video and audio: one for each).
    latents: list[fx.Node] = []
    answers: list[int] = []
    for index, output in enumerate(results_of(graph)):
        value = value_of(output) if isinstance(output, fx.Node) else None
        if not isinstance(value, torch.Tensor):
            continue
        shape = value.shape
        likeness = {node: _likeness(value_of(node).shape, shape) for node in entering}
        best = max(likeness.values(), default=0)
        found = [n for n in entering if likeness[n] == best > 0 and n not in latents]
        latents += found
        answers += [index] * len(found)
    position = {node: index for index, node in enumerate(placeholders)}
    conditions = [
        node
        for node in placeholders
        if node not in timed and node not in latents and node not in sizes and tells(node)
    ]
    return Clock(
        times=tuple(sorted(position[node] for node in timed)),
        latents=tuple(position[node] for node in latents),
        answers=tuple(answers),
        conditions=tuple(position[node] for node in conditions),
    )
