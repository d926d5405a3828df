"""The residual partner of a block stack's output: what it was before the blocks added to it."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from ..base import Reason, Skip
from ..graph.nodes import ancestors, call_name, is_data_dependent, is_model_state, value_of

__all__ = ["Stream", "is_activation", "partner_of"]


@dataclass(frozen=True)
class Stream:
    """A value that leaves a region, and its residual partner that entered it.

    additive: whether the partner was found along additions; otherwise it is the entering
        activation of that shape which the region reads first.
    """

    output: fx.Node
    partner: fx.Node
    additive: bool


def _window(node: fx.Node) -> tuple[int, object, object] | None:
    """(dimension, start, length) if `node` cuts one dimension of its input, else None."""
    source = node.all_input_nodes[0]
    if node.target is not operator.getitem:
        if node.target in ("narrow", torch.narrow):
            dim, start, length = node.args[1:4]
            return dim % value_of(source).dim(), start, length
        return None
    index = node.args[1]
    if isinstance(index, int) and not isinstance(value_of(source), torch.Tensor):
        pieces, tensor = value_of(source), source.all_input_nodes[0]
        if not isinstance(value_of(tensor), torch.Tensor):
            return None
        whole = value_of(tensor).shape
        for dim, size in enumerate(whole):
            lengths = [piece.shape[dim] for piece in pieces]
            if len(pieces) > 1 and lengths[0] != size:
                return dim, sum(lengths[:index]), lengths[index]
        return None
    if not isinstance(value_of(node), torch.Tensor):
        return None
    items = index if isinstance(index, tuple) else (index,)
    before, after = value_of(source).shape, value_of(node).shape
    if len(before) != len(after) or not all(isinstance(item, slice) for item in items):
        return None
    for dim, item in enumerate(items):
        if before[dim] == after[dim]:
            continue
        if item.start is None:
            return dim, 0, after[dim]
        if item.stop is None:
            return dim, before[dim] - after[dim], after[dim]
        return None
    return None


def _additive_sources(output: fx.Node, inside: set[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Values outside `inside` that reach `output` through additions and rearrangements alone.

    With each, the inside nodes that read it on such a path.
    """
    passing = {
        "add", "add_", "iadd", "sub", "to", "type_as", "float", "half", "bfloat16", "contiguous",
        "clone", "view", "reshape", "flatten", "unflatten", "permute", "transpose", "unsqueeze",
        "squeeze", "dropout", "clip", "clamp", "nan_to_num", "where",
    }  # fmt: skip
    found: dict[fx.Node, list[fx.Node]] = {}
    seen: set[tuple[fx.Node, str]] = set()
    todo: list[tuple[fx.Node, tuple[int, object, object] | None, fx.Node]] = [
        (output, None, output)
    ]
    while todo:
        node, window, reader = todo.pop()
        if node not in inside:
            found.setdefault(node, []).append(reader)
            continue
        visit = (node, str(window))  # as text: symbolic sizes have no hash
        if visit in seen:
            continue
        seen.add(visit)
        name = call_name(node)
        sources = [n for n in node.all_input_nodes if isinstance(value_of(n), torch.Tensor)]
        if name in ("cat", "concat", "concatenate"):
            dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
            dim = dim % value_of(node).dim()
            offset: object = 0
            for source in sources:
                if value_of(source).dim() != value_of(node).dim():
                    continue  # torch joins an empty tensor of one dimension to anything
                length = value_of(source).shape[dim]
                if window is None or (
                    window[0] == dim and window[1] == offset and window[2] == length
                ):
                    todo.append((source, None, node))
                offset = offset + length
        elif name in ("getitem", "narrow"):
            source = node.all_input_nodes[0]
            cut = _window(node)
            if not isinstance(value_of(source), torch.Tensor):
                # A piece of chunk, split or unbind; a block that returns a tuple is flattened.
                producer = call_name(source)
                if producer not in ("chunk", "split", "split_with_sizes", "unbind", "tensor_split"):
                    continue
                source = source.all_input_nodes[0]
            todo.append((source, cut if cut is not None else window, node))
        elif name in passing:
            # A reshape loses track of the cut; the shape test at the end still holds.
            keeps = name in ("add", "add_", "iadd", "sub", "to", "contiguous", "clone", "dropout")
            todo.extend((source, window if keeps else None, node) for source in sources)
    return found


def is_activation(node: fx.Node) -> bool:
    """Whether a value can be predicted: a floating-point tensor of foreseeable shape."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dim() < 2:
        return False
    # A size that depends on data can't be known before the step, when the state is made.
    return not any(map(is_data_dependent, value.shape))


def _least(ranks: Mapping[fx.Node, tuple[int, int]]) -> fx.Node | None:
    """The node of the least rank; None where there is none, or several have it."""
    found = [node for node, rank in ranks.items() if rank == min(ranks.values())]
    return found[0] if len(found) == 1 else None


def partner_of(output: fx.Node, inside: set[fx.Node], entering: Sequence[fx.Node]) -> Stream | Skip:
    """The partner of a value that leaves the nodes `inside`, among the `entering` ones."""
    shape = value_of(output).shape

    def fits(node: fx.Node) -> bool:
        return is_activation(node) and value_of(node).shape == shape and not is_model_state(node)

    order = {node: position for position, node in enumerate(output.graph.nodes)}

    def entrance(readers: Sequence[fx.Node]) -> tuple[int, int]:
        return min(order[reader] for reader in readers), len(set(readers))

    additive = {
        node: entrance(readers)
        for node, readers in _additive_sources(output, inside).items()
        if fits(node)
    }
    # Hints and position embeddings are added along the way; the stream itself entered first, and
    # once.
    if (partner := _least(additive)) is not None:
        return Stream(output, partner, additive=True)
    if additive:
        names = ", ".join(node.name for node in sorted(additive, key=additive.__getitem__))
        return Skip(
            Reason.NO_PARTNER, f"several entering values add up to it: {names}", output.name
        )
    # Any partner is right, as what is forecast is the difference; the stream itself forecasts best.
    makers = inside & ancestors([output])  # of stacks side by side, only its own
    same_shape = {
        node: entrance(readers)
        for node in entering
        if fits(node) and (readers := [user for user in node.users if user in makers])
    }
    if (partner := _least(same_shape)) is not None:
        return Stream(output, partner, additive=False)
    return Skip(
        Reason.NO_PARTNER,
        f"no entering value reaches it by additions, and of {len(same_shape)} entering activations "
        f"of its shape {tuple(shape)} none comes first",
        output.name,
    )
