"""ZipAR: a decode step writes its keys and values where a schedule says, not at the cache's end.

Before, in a step that a static cache of transformers runs through (several tokens at once):

    position = arange(tokens) + counter            counter += tokens
    keys.index_copy_(2, position, new_keys)        values.index_copy_(2, position, new_values)
    attention(query, keys, values, mask)

After, with `slots` as a new input and the caches as results instead of as memory written to:

    keys, values = write(keys, slots, new_keys), write(values, slots, new_values)
    attention(query, keys, values, mask)

so that steps can be chained in one graph, and the tokens of a step may belong to different rows of
a picture. Tokens, positions and mask are inputs already; `raster.py` says what they are.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from ..base import Feature, Pass, PassResult, Program, Reason, Skip
from ..graph.emit import Slot, add_input, emit
from ..graph.facts import remove_dead_code
from ..graph.nodes import (
    ancestors,
    call_name,
    copy_module,
    results_of,
    value_of,
)

__all__ = ["CacheState", "ZipARPass", "write"]

TOKENS = 2  # the dimension of a cache [batch, heads, slots, size] that tokens are along


def write(cache: Tensor, slots: Tensor, new: Tensor) -> Tensor:
    """A cache [B, H, L, D] in which `new` [B, H, T, D] is at `slots`, int64 [B, T]."""
    batch = torch.arange(cache.shape[0], device=cache.device)[:, None, None]
    heads = torch.arange(cache.shape[1], device=cache.device)[None, :, None]
    # Under autocast they may be of another precision, as where a cache is made longer.
    return cache.index_put((batch, heads, slots[:, None]), new.to(cache.dtype))


@dataclass(frozen=True)
class CacheState:
    """What the rewritten step takes and returns beyond its own (`passes.base.State`).

    caches: placeholders of the caches, whose new contents are the results after the step's own, in
    this order, of the form `outputs`. inputs: `slots`, int64 [batch, tokens].
    """

    caches: tuple[str, ...]
    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return int(self.inputs[0].shape[1])

    @property
    def slots(self) -> int:
        """Tokens that a cache has room for."""
        return int(self.outputs[0].shape[TOKENS])

    def bytes(self) -> int:
        """Bytes of all caches."""
        return sum(math.prod(each.shape) * each.dtype.itemsize for each in self.outputs)


@dataclass(frozen=True)
class _Write:
    node: fx.Node
    cache: fx.Node
    index: fx.Node
    new: fx.Node


@dataclass(frozen=True)
class ZipARPass(Pass):
    """See the module. Not among `PASSES`: `accel.ZipAR` runs it on the decode steps it captures."""

    name: ClassVar[str] = "zipar"
    summary: ClassVar[str] = (
        "decodes the rows of a picture beside each other, several passes in one graph"
    )
    applies: ClassVar[str] = (
        "when called by `accel.ZipAR`: language models with a key and value cache and full "
        "attention"
    )
    keeps: ClassVar[str] = "the cache, and which tokens are there"
    features: ClassVar[frozenset[Feature]] = frozenset({Feature.STATE})

    def run(self, program: Program) -> tuple[Program, PassResult]:
        """Rewrite all writes, or none: Skip says what is in the way."""
        found = _match(program)
        if isinstance(found, Skip):
            return program, PassResult(self.name, skipped=(found,))
        rewritten, state = _rewrite(program, found)
        details = {
            "tokens a step": state.tokens,
            "slots": state.slots,
            "cache bytes": state.bytes(),
        }
        matched = (f"{len(state.caches) // 2} layers' keys and values",)
        return rewritten, PassResult(self.name, matched, details=details)


def _slot_like(name: str, node: fx.Node) -> Slot:
    value = value_of(node)
    return Slot(name, tuple(value.shape), value.dtype, value.device)


def _match(program: Program) -> list[_Write] | Skip:
    """All writes to caches, in graph order; or why they can't be rewritten."""
    if program.training:
        return Skip(Reason.TRAINING, "decoding is for inference; call the model under no_grad")
    graph, memory = program.module.graph, program.memory
    writes: list[_Write] = []
    for node in graph.nodes:
        if call_name(node) != "index_copy_":
            continue
        cache, dim, index, new = node.args
        if dim != TOKENS or cache.op != "placeholder" or value_of(cache).dim() != 4:
            return Skip(
                Reason.CACHE_FORM,
                "keys and values have to be [batch, heads, slots, size], inputs of the graph, and "
                "written along slots",
                node.name,
            )
        writes.append(_Write(node, cache, index, new))
    if not writes:
        return Skip(Reason.NO_CACHE, "nothing is written by index_copy_, as a static cache does")
    if len({each.cache for each in writes}) < len(writes):
        return Skip(Reason.CACHE_FORM, "a cache is written twice in one step", writes[0].node.name)
    shapes = {(value_of(each.new).shape[0], value_of(each.new).shape[2]) for each in writes}
    lengths = {value_of(each.cache).shape[2] for each in writes}
    if len(shapes) > 1 or len(lengths) > 1:
        return Skip(
            Reason.CACHE_FORM,
            f"layers have caches of {sorted(map(str, lengths))} slots; all need as many, which "
            "layers with a sliding window do not have",
            writes[0].node.name,
        )
    order = {node: number for number, node in enumerate(graph.nodes)}
    for each in writes:
        if not _counts_up(each.index):
            return Skip(
                Reason.CACHE_FORM,
                "where it writes is not arange(tokens) + a counter",
                each.node.name,
            )
        own = memory.of(each.cache)
        others = [node for node in memory.writers
                  if node is not each.node and memory.written_by(node) & own]  # fmt: skip
        if others:
            return Skip(Reason.CACHE_FORM, "the cache is written otherwise, too", others[0].name)
        early = [node for node in graph.nodes
                 if order[node] < order[each.node] and memory.read_by(node) & own]  # fmt: skip
        if early:
            return Skip(Reason.CACHE_FORM, "the cache is read before it is written", early[0].name)
    return writes


def _counts_up(index: fx.Node) -> bool:
    """Whether an index is arange(tokens) + a counter that is an input."""
    if index.target not in (operator.add, torch.add):
        return False
    kinds = {call_name(each) if each.op != "placeholder" else each.op
             for each in index.all_input_nodes}  # fmt: skip
    return kinds == {"arange", "placeholder"}


def _rewrite(program: Program, writes: list[_Write]) -> tuple[Program, CacheState]:
    module, mapping = copy_module(program.module)
    graph = module.graph
    first = writes[0]
    batch, _, tokens, _ = value_of(first.new).shape
    slot = Slot("slots", (int(batch), int(tokens)), torch.long, value_of(first.new).device)
    slots = add_input(module, slot)
    counters = {
        mapping[each]
        for found in writes
        for each in ancestors([found.index])
        if each.op == "placeholder"
    }
    new_caches = []
    for found in writes:
        node, cache = mapping[found.node], mapping[found.cache]
        with graph.inserting_before(node):
            written = emit(graph, write, cache, slots, mapping[found.new], like=node)
        for user in list(cache.users):
            if user not in (written, node):
                user.replace_input_with(cache, written)
        node.replace_all_uses_with(written)
        graph.erase_node(node)
        new_caches.append(written)
    removed = [*program.removed, *(found.node.name for found in writes)]
    # The counter is no longer read, and counting it up would be a side effect.
    for node in reversed(list(graph.nodes)):
        if call_name(node) == "add_" and node.args[0] in counters and not node.users:
            removed.append(node.name)
            graph.erase_node(node)
    output = graph.output_node()
    output.args = ((*results_of(graph), *new_caches),)
    remove_dead_code(graph)
    module.recompile()
    state = CacheState(
        caches=tuple(mapping[found.cache].name for found in writes),
        inputs=(slot,),
        outputs=tuple(_slot_like(f"{found.cache.name}_out", found.cache) for found in writes),
    )
    rewritten = dataclasses.replace(
        program, module=module, added=(*program.added, state), removed=tuple(removed)
    )
    return rewritten, state
