"""A causal language model's decode step, rewritten by the ZipAR pass, as the model is now."""

from __future__ import annotations

import functools
import itertools
import operator
import types
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers.cache_utils import Cache, StaticLayer

from ....kernels.errors import OptionError, first_line
from ....passes import Program, verify
from ....passes.base import PassResult
from ....passes.graph.emit import Slot, add_input
from ....passes.graph.nodes import results_of, value_of
from ....passes.zipar.rewrite import CacheState, ZipARPass
from ...capture import captured, not_whole
from ...export.capture import Step, sources_of
from .names import cache_name

__all__ = ["DecodeStep", "StepCapture"]

# Dynamo leaves some of what a graph was traced with unguarded, or takes it for unchanged where a
# dictionary is, to save time in each call. Here guards are checked once a picture, so all are.
ALL_GUARDS = {
    "skip_nnmodule_hook_guards": False,
    "skip_no_tensor_aliasing_guards_on_parameters": False,
    "skip_tensor_guards_with_matching_dict_tags": False,
    "use_recursive_dict_tags_for_guards": False,
}


@dataclass(frozen=True, eq=False)
class DecodeStep:
    """A step that was captured.

    module: its forward(tokens, positions, mask, slots, *caches), int64 [B, width] twice, float
    [B, 1, width, L] and int64 [B, width], gives logits [B, heads, vocabulary] and the new caches.
    result: what the pass says.
    """

    module: Step
    vocabulary: int
    result: PassResult


def _decode(
    model: Any, name: str, heads: int, tokens: Tensor, positions: Tensor, mask: Tensor,
    counter: Tensor, caches: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """A model's forward as decoding calls it, with the cache, its argument `name`, as tensors."""
    layers: list[Any] = []
    for keys, values in zip(caches[::2], caches[1::2], strict=True):
        layer = StaticLayer(keys.shape[2])
        layer.keys, layer.values, layer.cumulative_length = keys, values, counter
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        layers.append(layer)
    logits: Tensor = model(
        input_ids=tokens,
        position_ids=positions,
        attention_mask=mask,
        use_cache=True,
        logits_to_keep=torch.arange(heads, device=tokens.device),
        **{name: Cache(layers=layers)},
    ).logits
    return logits


class StepCapture:
    """The decode step of a model, as the model is when it is asked for.

    width: tokens a step. heads: how many of them, the first ones, are asked for the next token.

    Whether a captured step still is the model's is for Dynamo's guards to say, which it made of all
    that the model's forward read in Python: the call goes through `torch.compile`, whose back end
    computes nothing. Where a guard fails (an adapter switched, a module or a hook put in, another
    dtype, shape or setting) that captures the step anew; else it hands over the model's tensors of
    now, which take the place of those before (changed in place, or by `load_state_dict` with
    assign=True). A step that was captured once is found again. Methods of classes have no guard, so
    those of the model's are compared here: which functions they are. What nothing sees: a function
    whose code is put in its place in it, and classes of helpers that are no modules.
    """

    def __init__(self, width: int, heads: int) -> None:
        self.width = width
        self.heads = heads
        self.steps: dict[int, DecodeStep] = {}
        self._numbers = itertools.count()
        self._seen: _Seen | None = None
        self._runs: dict[Any, Callable[..., Any]] = {}  # by the methods of a model's classes

    @torch.no_grad()
    def __call__(self, model: Any, caches: Sequence[Tensor]) -> DecodeStep:
        """caches: keys and values of each layer in turn, [B, H, L, D]; only their shapes count.

        Raises OptionError where the model can't be captured or the pass declines.
        """
        name = type(model).__name__
        given = self._inputs(caches)
        methods = _methods(model)
        if methods not in self._runs:
            # Dynamo keeps the back end for ever: it must not keep this and its tensors.
            self._runs[methods] = captured(
                _decode, functools.partial(_collect, weakref.ref(self)), config=ALL_GUARDS,
                dynamic=False, isolate_recompiles=True,
            )  # fmt: skip
        try:
            self._runs[methods](model, cache_name(model), self.heads, *given.values(), list(caches))
        except not_whole() as error:
            raise OptionError(
                f"the decode step of {name} can't be captured as one graph: {first_line(error)}"
            ) from error
        seen, self._seen = self._seen, None
        if seen is None:
            raise OptionError(
                f"the decode step of {name} can't be captured, as torch.compile is switched off "
                "(TORCH_COMPILE_DISABLE, or torch.compiler.disable); ZipAR needs it"
            )
        if not seen.result.matched:
            raise OptionError(f"{name} can't be decoded by ZipAR: {seen.result.skipped[0]}")
        step = self.steps.get(seen.number)
        if step is None:
            module = _as_step(model, seen.program, seen.inputs, [*given.items()], caches, name)
            results = results_of(seen.program.module.graph)
            step = DecodeStep(module, int(value_of(results[0]).shape[-1]), seen.result)
            self.steps[seen.number] = step
        else:
            _renew(step.module, seen.inputs)
        return step

    def _inputs(self, caches: Sequence[Tensor]) -> dict[str, Tensor]:
        """What `_decode` is called with beside the caches; only shapes count."""
        batch, _, slots, _ = caches[0].shape
        device = caches[0].device
        whole = torch.arange(self.width, device=device).expand(batch, -1).contiguous()
        return {
            "tokens": torch.zeros_like(whole), "positions": whole,
            "mask": caches[0].new_zeros((batch, 1, self.width, slots)),
            "counter": torch.zeros((), dtype=torch.long, device=device),
        }  # fmt: skip


@dataclass(frozen=True)
class _Seen:
    """A graph that Dynamo called, and what with."""

    number: int
    program: Program
    result: PassResult
    inputs: tuple[Any, ...]


def _collect(
    reference: weakref.ref[StepCapture], module: fx.GraphModule, example_inputs: list[Any]
) -> Callable[..., Any]:
    """A back end of `torch.compile` that says which graph is called, and computes nothing."""
    owner = reference()
    assert owner is not None
    number = next(owner._numbers)
    program = Program.capture(module)
    rewritten, result = ZipARPass().run(program)
    if rewritten is not program:
        verify(program, rewritten, ZipARPass.name)
    count = len(results_of(module.graph))
    del owner, program

    def call(*inputs: Any) -> tuple[Tensor, ...]:
        owner = reference()
        assert owner is not None
        owner._seen = _Seen(number, rewritten, result, inputs)
        return tuple(torch.empty(0) for _ in range(count))

    return call


def _methods(model: nn.Module) -> frozenset[tuple[type, str, Any]]:
    """The functions that the classes of a model's modules have for methods."""
    kinds = {type(each) for each in model.modules()}
    classes = {each for kind in kinds for each in kind.__mro__}
    return frozenset(
        (each, name, method)
        for each in classes
        for name, method in vars(each).items()
        if isinstance(method, types.FunctionType)
    )


def _renew(module: Step, inputs: Sequence[Any]) -> None:
    """Put a model's tensors of now in the place of those that a step holds."""
    for name, tensor in zip(module.arguments, inputs, strict=False):
        if isinstance(name, str) and getattr(module, name) is not tensor:
            if name in module._parameters and not isinstance(tensor, nn.Parameter):
                delattr(module, name)
                module.register_buffer(name, tensor)
            else:
                setattr(module, name, tensor)


def _as_step(
    model: nn.Module,
    program: Program,
    inputs: Sequence[Any],
    given: Sequence[tuple[str, Tensor]],
    caches: Sequence[Tensor],
    name: str,
) -> Step:
    """The rewritten graph as a module of the tensors that vary; the model's own are in it."""
    state: CacheState = program.state
    # In the order of `forward`: slots take the counter's place.
    position = {id(tensor): index for index, (_, tensor) in enumerate(given)}
    position |= {id(cache): len(given) + index for index, cache in enumerate(caches)}
    placeholders = list(program.module.graph.find_nodes(op="placeholder"))
    sources, tensors = sources_of(model, placeholders, inputs, position)
    arguments: list[int | str | tuple[int, int]] = []
    for node, value, source in zip(placeholders, inputs, sources, strict=False):
        if source is None:
            raise OptionError(f"{name} reads the number {value} ({node.name}), which may change")
        arguments.append(source)
    read = {source for source in sources if isinstance(source, int)}
    arguments.append(3)  # slots
    listed = _take_out_lists(program.module, caches[0].device)
    tensors |= listed
    arguments += listed
    for index, what in enumerate(("tokens", "position_ids", "attention_mask")):
        if index not in read:
            raise OptionError(
                f"{name} does not read the {what} that it is given; ZipAR needs a model that does"
            )
    if len(state.caches) != len(caches):
        raise OptionError(
            f"{name} writes {len(state.caches)} of its {len(caches)} keys and values in a step"
        )
    by_name = {node.name: position[id(value)] for node, value in
               zip(placeholders, inputs, strict=False) if id(value) in position}  # fmt: skip
    order = {by_name[cache]: program.outputs + number for number, cache in enumerate(state.caches)}
    kept = [0, *(order[len(given) + index] for index in range(len(caches)))]
    assert len(results_of(program.module.graph)) == program.outputs + len(caches)
    return Step(program.module, arguments, tensors, kept).eval()


def _take_out_lists(module: fx.GraphModule, device: torch.device) -> dict[str, Tensor]:
    """Lists of numbers that the graph indexes with, and a number written there, become inputs of
    it, the last ones.

    Chameleon names its tokens of pictures so. Inside a loop torch would make constants of them,
    which it then can't export.
    """
    found: dict[str, Tensor] = {}

    def take_out(values: Tensor) -> fx.Node:
        slot = Slot(f"listed_{len(found)}", tuple(values.shape), values.dtype, device)
        node = add_input(module, slot)
        found[node.name] = values.to(device)
        return node

    for node in list(module.graph.nodes):
        if node.target not in (operator.getitem, operator.setitem):
            continue
        index = node.args[1]
        parts = list(index) if isinstance(index, tuple) else [index]
        lists = [place for place, part in enumerate(parts)
                 if isinstance(part, list) and all(type(each) is int for each in part)]  # fmt: skip
        for place in lists:
            parts[place] = take_out(torch.tensor(parts[place]))
        if lists:
            node.update_arg(1, tuple(parts) if isinstance(index, tuple) else parts[0])
        if lists and node.target is operator.setitem and isinstance(node.args[2], (int, float)):
            dtype = value_of(node.args[0]).dtype
            node.update_arg(2, take_out(torch.tensor(node.args[2], dtype=dtype)))
    module.recompile()
    return found
