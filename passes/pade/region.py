"""The region of a graph that a skip branch can stand for: a run of block stacks.

A *region* is a run of one or more stacks (Flux: double, then single blocks). It has to have, for
each value that leaves it, a residual *partner*: the value that entered it and reached the end
through additions alone, so that `output - partner` is what the blocks have added. Everything that
only the region needs (timestep embeddings inside blocks, text projections) sinks into it; what
others need too stays outside.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ..base import Reason, Skip
from ..blocks import Stack, find_stacks
from ..graph.facts import Memory
from ..graph.nodes import ancestors, descendants, is_data_dependent, value_of
from ..graph.regions import live_ins, live_outs, unsafe_effect
from .pairing import Stream, is_activation, partner_of

__all__ = ["Region", "find_region"]

SMALL = 0.05  # a stack below this share of the largest one's work bounds no region


@dataclass(frozen=True)
class Region:
    """A run of stacks that can be replaced as a whole."""

    stacks: tuple[Stack, ...]
    nodes: tuple[fx.Node, ...]
    streams: tuple[Stream, ...]

    @property
    def blocks(self) -> int:
        return sum(len(stack.blocks) for stack in self.stacks)


def _crosses(node: fx.Node) -> bool:
    """Whether a value can be an operand of a branch."""
    return isinstance(value_of(node), (torch.Tensor, torch.SymInt, int))


def _closed(tagged: set[fx.Node]) -> set[fx.Node]:
    """`tagged` and all nodes on paths between them (the glue between blocks)."""
    return descendants(tagged) & ancestors(tagged)


def _try_region(graph: fx.Graph, stacks: Sequence[Stack], memory: Memory) -> Region | Skip:
    order = {node: position for position, node in enumerate(graph.nodes)}
    tagged = {n for stack in stacks for block in stack.blocks for n in block.nodes}
    tagged = {node for node in tagged if node.op not in ("placeholder", "get_attr", "output")}
    closed = _closed(tagged)
    last_block = {n for n in stacks[-1].blocks[-1].nodes if n in closed}
    dependent = descendants(last_block)

    # 1. What leaves the last block, and what it was before the blocks.
    entering = sorted(
        {s for node in closed for s in node.all_input_nodes if s not in closed},
        key=order.__getitem__,
    )
    leaving = [
        node
        for node in sorted(closed, key=order.__getitem__)
        if node in dependent and any(user not in closed for user in node.users)
    ]
    if not leaving:
        return Skip(Reason.NO_PARTNER, "nothing that the last block computes is used after it")
    partners = []
    for node in leaving:
        if not is_activation(node):
            return Skip(
                Reason.UNSUPPORTED_VALUE,
                f"{type(value_of(node)).__name__} leaves the last block; only tensors of floating "
                "point with a batch dimension can be predicted",
                node.name,
            )
        stream = partner_of(node, closed, entering)
        if isinstance(stream, Skip):
            return stream
        partners.append(stream.partner)

    # 2. The nodes that carry those streams, and whatever only they need.
    carried = descendants(partners)
    core = {node for node in closed if node in carried and node not in partners}
    region = set(core)
    for node in reversed(list(graph.nodes)):
        sinks = (
            node not in region
            and node not in partners
            and node.op not in ("placeholder", "output", "get_attr")
            and node.users
            and all(user in region for user in node.users)
            and memory.facts_of(node).pure
        )
        if sinks:
            region.add(node)
    # Only tensors and sizes may cross the border: pieces of a tuple are taken outside.
    for node in list(region):
        source = node.all_input_nodes[0] if node.target is operator.getitem else None
        if source is not None and source not in region and not _crosses(source):
            region.discard(node)
    nodes = tuple(sorted(region, key=order.__getitem__))

    # 3. Sound? Every leaving value needs a partner, and nothing inside may have side effects.
    for node in nodes:
        value = value_of(node)
        sizes = value.shape if isinstance(value, torch.Tensor) else [value]
        if any(map(is_data_dependent, sizes)):
            detail = "a size inside the blocks depends on data, which a branch can't hide"
            return Skip(Reason.UNSUPPORTED_VALUE, detail, node.name)
    effect = unsafe_effect(nodes, graph, memory)
    if effect is not None:
        return Skip(
            Reason.IMPURE,
            f"{effect.format_node()} has an effect beyond the blocks",
            effect.name,
        )
    streams = []
    for node in [*live_ins(nodes), *live_outs(nodes)]:
        if not _crosses(node):
            kind = type(value_of(node)).__name__
            return Skip(Reason.UNSUPPORTED_VALUE, f"a {kind} crosses the border", node.name)
    for node in live_outs(nodes):
        if not is_activation(node):
            return Skip(
                Reason.UNSUPPORTED_VALUE,
                f"{type(value_of(node)).__name__} leaves the blocks and is used after them",
                node.name,
            )
        found = partner_of(node, region, entering)
        if isinstance(found, Skip):
            return found
        if found.partner in region:
            return Skip(Reason.NO_PARTNER, "its partner is computed by the blocks", node.name)
        streams.append(found)
    return Region(tuple(stacks), nodes, tuple(streams))


def _cost(stacks: Sequence[Stack], memory: Memory) -> int:
    nodes = (node for stack in stacks for block in stack.blocks for node in block.nodes)
    return sum(memory.facts_of(node).flops for node in nodes)


def find_region(graph: fx.Graph, memory: Memory) -> tuple[Region | None, list[Skip]]:
    """The largest run of stacks with a sound residual pairing, and why larger ones were refused.

    memory: of the graph.
    """
    stacks = find_stacks(graph, memory)
    if not stacks:
        detail = (
            "no two modules of one class under one parent (as in layers.0, layers.1) that do a "
            "matrix product were found"
        )
        return None, [Skip(Reason.NO_BLOCKS, detail)]
    # Small stacks (embedders, refiners) may sink into the region, but need not bound it.
    largest = max(_cost([stack], memory) for stack in stacks)
    stacks = [stack for stack in stacks if _cost([stack], memory) >= SMALL * largest]
    runs = [
        stacks[start:stop]
        for start in range(len(stacks))
        for stop in range(start + 1, len(stacks) + 1)
    ]
    runs.sort(key=lambda run: _cost(run, memory), reverse=True)
    refused: list[Skip] = []
    for run in runs:
        found = _try_region(graph, run, memory)
        if isinstance(found, Region):
            return found, refused
        names = " + ".join(f"{stack.parent} ({len(stack.blocks)})" for stack in run)
        refused.append(Skip(found.reason, f"{names}: {found.detail}", found.node))
    return None, refused
