"""Capturing a causal language model's decode step, and rewriting it by the ZipAR pass."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers.cache_utils import Cache, StaticLayer

from ...kernels.errors import OptionError, first_line
from ...passes import Program, verify
from ...passes.base import PassResult
from ...passes.graph.emit import Slot, add_input
from ...passes.graph.nodes import results_of, value_of
from ...passes.zipar.rewrite import CacheState, ZipARPass
from ..export.capture import UNREACHED, Step, sources_of

__all__ = ["capture_step"]


class _Captured(nn.Module):
    """A model's forward as decoding calls it, with the cache as plain tensors."""

    def __init__(self, model: Any, heads: int) -> None:
        super().__init__()
        self.model = model
        self.heads = heads

    def forward(
        self, tokens: Tensor, positions: Tensor, mask: Tensor, counter: Tensor, *caches: Tensor
    ) -> Tensor:
        layers: list[Any] = []
        for keys, values in zip(caches[::2], caches[1::2], strict=True):
            layer = StaticLayer(keys.shape[2])
            layer.keys, layer.values, layer.cumulative_length = keys, values, counter
            layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
            layers.append(layer)
        logits: Tensor = self.model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=Cache(layers=layers),
            use_cache=True,
            logits_to_keep=torch.arange(self.heads, device=tokens.device),
        ).logits
        return logits


@torch.no_grad()
def capture_step(
    model: Any, caches: Sequence[Tensor], width: int, heads: int
) -> tuple[nn.Module, int, PassResult]:
    """A module that runs one step, the size of the vocabulary, and what the pass says.

    caches: keys and values of each layer in turn, [B, H, L, D]. width: tokens a step. heads: how
    many of them, the first ones, are asked for the next token.
    The module's forward(tokens, positions, mask, slots, *caches), int64 [B, width] twice, float
    [B, 1, width, L] and int64 [B, width], gives logits [B, heads, vocabulary] and the new caches.
    Raises OptionError where the model can't be captured or the pass declines.
    """
    name = type(model).__name__
    batch, _, slots, _ = caches[0].shape
    device = caches[0].device
    mask = torch.zeros((batch, 1, width, slots), dtype=caches[0].dtype, device=device)
    whole = torch.arange(width, device=device).expand(batch, -1).contiguous()
    own = [torch.zeros_like(each) for each in caches]
    given: dict[str, Any] = {
        "tokens": torch.zeros_like(whole), "positions": whole, "mask": mask,
        "counter": torch.zeros((), dtype=torch.long, device=device),
    }  # fmt: skip
    seen: dict[str, Any] = {}

    def collect(module: fx.GraphModule, example_inputs: list[Any]) -> Any:
        program = Program.capture(module)
        rewritten, seen["result"] = ZipARPass().run(program)
        if rewritten is not program:
            verify(program, rewritten, ZipARPass.name)
        seen["program"] = rewritten

        def call(*inputs: Any) -> Any:
            seen["inputs"] = inputs
            return module.forward(*inputs)

        return call

    wrapped = _Captured(model, heads)
    try:
        with torch._dynamo.config.patch(
            recompile_limit=UNREACHED, accumulated_recompile_limit=UNREACHED
        ):
            torch.compile(wrapped, backend=collect, fullgraph=True, dynamic=False)(
                *given.values(), *own
            )
    except torch._dynamo.exc.Unsupported as error:
        raise OptionError(
            f"the decode step of {name} can't be captured as one graph: {first_line(error)}"
        ) from error
    program: Program = seen["program"]
    result: PassResult = seen["result"]
    if not result.matched:
        raise OptionError(f"{name} can't be decoded by ZipAR: {result.skipped[0]}")
    module = _as_step(wrapped, program, seen["inputs"], [*given.items()], own, name)
    vocabulary = int(value_of(results_of(program.module.graph)[0]).shape[-1])
    seen.clear()  # Dynamo keeps `call` for as long as the class has compiled code
    return module, vocabulary, result


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
