"""Capturing a model on example inputs: one rewritten graph, ready to be exported."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from ...kernels.errors import EngineError, ExportError, first_line
from ...kernels.exports import EXPORT_BODIES
from ...passes import Constants, Feature, PadePass, PassResult
from ...passes.base import Program
from ...passes.graph.nodes import (
    copy_module,
    fake_mode,
    graph_modules,
    hint,
    is_model_state,
    mark_inputs,
    results_of,
    value_of,
)
from ...passes.pade.forecast import Profile
from ..capture import captured, not_whole
from ..options import Options
from ..pipeline import rewrite
from ..runtime.fingerprint import digests
from ..runtime.sizes import evaluate, text_of
from .manifest import LIKELY
from .paths import Path, flatten

__all__ = ["Captured", "Step", "capture", "signature_of", "sources_of"]


class Step(nn.Module):
    """A rewritten graph with the model's tensors as its own and its sizes read off its inputs.

    forward(*tensors): the caller's tensors, then the state's. The results are those of the graph
    that `kept` lists.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        arguments: Sequence[int | str | tuple[int, int] | None],
        tensors: Mapping[str, Tensor],
        kept: Sequence[int],
    ) -> None:
        super().__init__()
        self.module = module
        self.kept = tuple(kept)
        self.arguments = tuple(arguments)
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def forward(self, *tensors: Tensor) -> tuple[Any, ...]:
        """arguments: a name is a tensor of the model, a number an input, a pair a size of one; None
        is what the graph no longer reads."""
        arguments: list[Any] = []
        for argument in self.arguments:
            if isinstance(argument, str):
                arguments.append(getattr(self, argument))
            elif isinstance(argument, int):
                arguments.append(tensors[argument])
            elif argument is None:
                arguments.append(None)
            else:
                arguments.append(tensors[argument[0]].shape[argument[1]])
        results = self.module(*arguments)
        return tuple(results[index] for index in self.kept)


@dataclass(frozen=True)
class Captured:
    """One model, captured whole.

    results: what the passes did.
    examples: an example for each input of `step`, the state's last; nodes: their placeholders.
    paths: where the caller's inputs are in its arguments. symbols: the input and the dimension
    that each symbol in a size is; conditions: what has to hold for them.
    constants, ignored: other values in the arguments, and tensors that the model does not read.
    outputs: for each tensor of the model's result where it is, and which result of `step` it is;
    selective: whether sparse attention was put in; expected: those tensors, as the model gave them
    for the examples, with that; result_constants: what else the result holds.
    """

    program: Program
    results: tuple[PassResult, ...]
    step: Step
    examples: tuple[Tensor, ...]
    nodes: tuple[fx.Node, ...]
    paths: tuple[Path, ...]
    symbols: dict[str, tuple[int, int]]
    conditions: tuple[str, ...]
    constants: tuple[tuple[Path, Any], ...]
    ignored: tuple[Path, ...]
    outputs: tuple[tuple[Path, int], ...]
    expected: tuple[Tensor, ...]
    selective: bool
    result_constants: tuple[tuple[Path, Any], ...]


def signature_of(model: nn.Module) -> inspect.Signature:
    """What a model is called with. One that hands its arguments on may say so by a `__signature__`
    of its own, which is Python's protocol for that."""
    own = getattr(model, "__signature__", None)
    return own if isinstance(own, inspect.Signature) else inspect.signature(model.forward)


def _bind(
    signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """A call's arguments by the names of the parameters. Raises TypeError as a call would."""
    bound = signature.bind(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
        elif parameter.kind is parameter.VAR_POSITIONAL and bound.pop(name, ()):
            raise TypeError(f"positional arguments beyond the named ones (*{name}) have no name")
    return bound


def _check_profile(model: nn.Module, options: Options) -> None:
    """Raise ExportError for a profile of other weights: a file holds its own, and asks no more."""
    pade = options.of(PadePass)
    if pade is None or not isinstance(pade.profile, Profile):
        return
    missing = set(pade.profile.weights) - set(digests([*model.parameters(), *model.buffers()]))
    if missing:
        raise ExportError(
            f"the profile is not of this model: {len(missing)} of the {len(pade.profile.weights)} "
            "weights that it was made with are not in it. Calibrate it, or export it without"
        )


@torch.no_grad()
def capture(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: Options,
    cannot: Mapping[Feature, str],
    free: bool = True,
    plain: bool = True,
) -> Captured:
    """Capture `model(*args, **kwargs)` and apply the passes.

    cannot: features that the format can't hold, and why. plain: whether accel's own operators have
    to go. free: every size of an input that the model leaves free stays free, but for sizes of 1;
    else all are fixed. The model runs once. Raises ExportError if it can't be captured as one
    graph, or a profile is of other weights.
    """
    _check_profile(model, options)
    name = type(model).__name__
    signature = signature_of(model)
    try:
        arguments = _bind(signature, args, kwargs)
    except TypeError as error:
        raise ExportError(f"{name} does not take these example inputs: {error}") from error
    if "return_dict" in signature.parameters:
        arguments["return_dict"] = True  # its names serve both forms of the result
    still: set[tuple[Path, int]] = set()
    if not free:
        leaves = [each for each in flatten(arguments) if isinstance(each[1], Tensor)]
        still = {(path, dim) for path, leaf in leaves for dim in range(leaf.dim())}
    while True:
        traced = _trace(model, arguments, options, cannot, still, plain)
        captured, fixed = _captured(model, *traced)
        if not fixed:
            return captured
        still |= fixed


def _trace(
    model: nn.Module,
    arguments: Mapping[str, Any],
    options: Options,
    cannot: Mapping[Feature, str],
    still: Collection[tuple[Path, int]],
    plain: bool,
) -> tuple[list[tuple[Path, Any]], Any, dict[str, Any]]:
    """Run the model once under Dynamo: the inputs' leaves, the result, and what was seen.

    still: dimensions of inputs that keep the example's size.
    """
    name = type(model).__name__
    # Copies, so that the marks below do not stay on the caller's tensors; in plain layout, as an
    # engine takes them.
    copied = partial(torch.clone, memory_format=torch.contiguous_format)
    arguments = tree_map_only(Tensor, copied, dict(arguments))
    leaves = flatten(arguments)
    seen: dict[str, Any] = {}

    def collect(module: fx.GraphModule, example_inputs: list[Any]) -> Any:
        shapes = fake_mode(module.graph).shape_env
        # The model took its way by these: another size would have to go another way.
        guards = (shapes.replace(each.expr) for each in shapes.guards)
        seen["guards"] = [guard for guard in guards if guard.free_symbols]
        seen["ranges"] = {str(s): limits for s, limits in shapes.var_to_range.items()}
        seen["program"], seen["results"] = rewrite(_one_node_a_size(module), options, cannot)
        if plain:
            _put_export_bodies(seen["program"].module)
        seen["selective"] = any(r.name == "omnisparse" and r.matched for r in seen["results"])
        expected = Program.capture(module)
        if seen["selective"]:  # which changes every step
            alone = options.without("pade", "outline")
            expected, _ = rewrite(module, alone, cannot)

        def call(*inputs: Any) -> Any:
            made = [each for added in expected.constants for each in added.computed(inputs)]
            results = expected.module.forward(*inputs, *made)
            seen["inputs"], seen["outputs"] = inputs, results[: expected.outputs]
            return seen["outputs"]

        return call

    for path, leaf in leaves:
        for dim in range(leaf.dim() if isinstance(leaf, Tensor) else 0):
            if (path, dim) in still:
                torch._dynamo.mark_static(leaf, dim)
            else:
                torch._dynamo.maybe_mark_dynamic(leaf, dim)
    try:
        result = captured(model, collect)(**arguments)
    except not_whole() as error:
        raise ExportError(
            f"{name} can't be captured as one graph: {first_line(error)}. Only a model that "
            "torch.compile(fullgraph=True) takes can be exported"
        ) from error
    if not seen:
        raise ExportError(f"{name} computes nothing with tensors on these inputs")
    # Dynamo keeps `call` for as long as the class has compiled code: don't let it hold tensors.
    record = dict(seen)
    seen.clear()
    return leaves, result, record


def _captured(
    model: nn.Module, leaves: Sequence[tuple[Path, Any]], result: Any, seen: Mapping[str, Any]
) -> tuple[Captured, set[tuple[Path, int]]]:
    """What was traced; and the dimensions that are free in it, but must not be."""
    program: Program = seen["program"]
    placeholders = list(program.module.graph.find_nodes(op="placeholder"))
    read = {
        id(value): node
        for node, value in zip(placeholders, seen["inputs"], strict=False)
        if isinstance(value, Tensor) and not is_model_state(node)
    }
    used = [(path, leaf) for path, leaf in leaves if id(leaf) in read]
    position = {id(leaf): index for index, (_, leaf) in enumerate(used)}
    symbols: dict[str, tuple[int, int]] = {}
    for index, (_, leaf) in enumerate(used):
        for dim, size in enumerate(value_of(read[id(leaf)]).shape):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                symbols.setdefault(str(size), (index, dim))

    sources, tensors = sources_of(model, placeholders, seen["inputs"], position)
    arguments: list[int | str | tuple[int, int] | None] = []
    for node, value, source in zip(placeholders, seen["inputs"], sources, strict=False):
        if isinstance(source, str) and not node.users:
            arguments.append(None)  # a weight in whose place a pass has put another
        elif source is not None:
            arguments.append(source)
        elif str(value_of(node)) in symbols:
            arguments.append(symbols[str(value_of(node))])
        else:
            raise ExportError(
                f"the model reads the number {value} ({node.name}) from its inputs; pass it as a "
                "tensor"
            )
    unread = tensors.keys() - {each for each in arguments if isinstance(each, str)}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in unread}
    state: list[fx.Node] = []
    rest = iter(placeholders[len(seen["inputs"]) :])
    for added in program.added:
        nodes = [next(rest) for _ in added.inputs]
        if isinstance(added, Constants):
            for node, tensor in zip(nodes, added.computed(seen["inputs"]), strict=True):
                name = node.name
                while name in tensors:
                    name += "_"  # the model has one of that name
                tensors[name] = tensor
                arguments.append(name)
        else:
            begin = len(used) + len(state)
            arguments += range(begin, begin + len(nodes))
            state += nodes
    conditions, fixed = _conditions(seen["guards"], symbols)
    # Torch takes a free size for 2 or more.
    conditions += tuple(f"{name} >= {int(seen['ranges'][name].lower)}" for name in symbols)
    dims = {
        (path, dim)
        for path, leaf in used
        for dim, size in enumerate(value_of(read[id(leaf)]).shape)
        if isinstance(size, torch.SymInt)
        and not fixed.isdisjoint(map(str, size.node.expr.free_symbols))
    }
    outputs, constants = _results(result, seen["outputs"])
    count = len(results_of(program.module.graph))
    kept = [*(index for _, index in outputs), *range(program.outputs, count)]
    is_tensor = [(path, leaf, isinstance(leaf, Tensor)) for path, leaf in leaves]
    captured = Captured(
        program=program,
        results=seen["results"],
        step=Step(program.module, arguments, tensors, kept).eval(),
        examples=(*(leaf for _, leaf in used), *map(_example, state)),
        nodes=(*(read[id(leaf)] for _, leaf in used), *state),
        paths=tuple(path for path, _ in used),
        symbols=symbols,
        conditions=conditions,
        constants=tuple((path, leaf) for path, leaf, tensor in is_tensor if not tensor),
        ignored=tuple(p for p, leaf, tensor in is_tensor if tensor and id(leaf) not in position),
        outputs=outputs,
        expected=tuple(seen["outputs"][index] for _, index in outputs),
        selective=seen["selective"],
        result_constants=constants,
    )
    return captured, dims


def sources_of(
    model: nn.Module, placeholders: Sequence[fx.Node], inputs: Sequence[Any],
    position: Mapping[int, int],
) -> tuple[list[int | str | None], dict[str, Tensor]]:  # fmt: skip
    """Where the inputs of a graph come from, and the model's tensors among them by name.

    position: the caller's tensors, by their id. Of each input the position, or the name of a tensor
    of the model's; None for what is no tensor.
    """
    owned = [*model.named_parameters(), *model.named_buffers()]
    named = {id(tensor): name.replace(".", "__") for name, tensor in owned}
    sources: list[int | str | None] = []
    tensors: dict[str, Tensor] = {}
    for node, value in zip(placeholders, inputs, strict=False):
        source: int | str | None = position.get(id(value))
        if source is None and isinstance(value, Tensor):
            source = named.get(id(value), node.name)
            tensors[source] = value
        sources.append(source)
    return sources, tensors


def _conditions(
    guards: Sequence[Any], symbols: Mapping[str, Any]
) -> tuple[tuple[str, ...], set[str]]:
    """Conditions on sizes as text; and symbols that have to be fixed, as theirs can't be written.

    Of those only the fewest: once they are fixed, other conditions may become plain.
    """
    written: dict[str, None] = {}
    fixed: list[set[str]] = []
    for guard in guards:
        names = {str(symbol) for symbol in guard.free_symbols}
        text = text_of(guard)
        try:
            evaluate(text, {name: LIKELY for name in names if name in symbols})
            written.setdefault(text)
        except EngineError:
            fixed.append(names)
    return tuple(written), min(fixed, key=len, default=set())


def _one_node_a_size(module: fx.GraphModule) -> fx.GraphModule:
    """A copy in which equal sizes are one node: torch.export names operands after their nodes."""
    mark_inputs(module.graph)
    module, _ = copy_module(module)
    first: dict[str, fx.Node] = {}
    for node in module.graph.find_nodes(op="placeholder"):
        if isinstance(value_of(node), torch.SymInt):
            node.replace_all_uses_with(first.setdefault(str(value_of(node)), node))
    module.recompile()
    return module


def _put_export_bodies(module: fx.GraphModule) -> None:
    """Bodies of plain torch in the place of accel's own operators; see `kernels.exports`."""
    for part in graph_modules(module):
        for node in part.graph.nodes:
            if node.target in EXPORT_BODIES:
                node.target = EXPORT_BODIES[node.target]
        part.recompile()


def _example(node: fx.Node) -> Tensor:
    value = value_of(node)
    # Of its own for each input: one tensor given twice is taken for an alias.
    return torch.ones([hint(size) for size in value.shape], dtype=value.dtype, device=value.device)


def _results(
    result: Any, outputs: Sequence[Any]
) -> tuple[tuple[tuple[Path, int], ...], tuple[tuple[Path, Any], ...]]:
    position = {id(output): index for index, output in enumerate(outputs)}
    tensors, constants = [], []
    for path, leaf in flatten(result):
        if isinstance(leaf, Tensor):
            if id(leaf) not in position:
                raise ExportError(
                    f"the model's result {path} is no output of its graph: it hands on an input"
                )
            tensors.append((path, position[id(leaf)]))
        elif leaf is None or isinstance(leaf, (str, int, float, bool)):
            constants.append((path, leaf))
        else:
            raise ExportError(
                f"the model's result holds a {type(leaf).__name__}; only tensors can be exported"
            )
    return tuple(tensors), tuple(constants)
