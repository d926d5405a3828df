"""Attention masks that a graph builds from nothing but sizes: what they hide.

Libraries build causal masks from `arange` and comparisons in every captured graph. Such a mask is a
constant of the sizes, and computing it tells whether it is causal: for certain where sizes are
fixed, and at two telling lengths where they are free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from .effects import changed_in_place, is_pure
from .graphs import ancestors, hint, value_of

__all__ = ["mask_kind"]

LARGEST = 2**30  # entries of a mask that is computed
SMALL = -1e4  # a score that is lowered by more is hidden


def mask_kind(mask: fx.Node) -> str:
    """Either "causal", "full" (nothing is hidden), or why that is not known.

    For free sizes it is computed at two lengths, of which one is more than twice any number in the
    code of the mask, so that a sliding window of that many keys would show.
    """
    needed = ancestors([mask])
    nodes = [node for node in mask.graph.nodes if node in needed]
    for node in nodes:
        if node.op == "get_attr" or (
            node.op == "placeholder" and not isinstance(value_of(node), (int, torch.SymInt))
        ):
            return f"the mask depends on {node.name}"
        if not is_pure(node):
            return f"computing the mask has side effects ({node.name})"
    change = changed_in_place(nodes, mask.graph)  # as by `mask[:, 5:] = False`
    if change is not None:
        return f"the mask is changed in place ({change.name})"
    symbols = {node: hint(value_of(node)) for node in nodes if node.op == "placeholder"}
    lengths = _free_lengths(value_of(mask), symbols)
    if lengths is None:
        return "the mask's sizes are computed from several free sizes"
    constants = [abs(each) for node in nodes for each in _numbers(node)]
    beyond = 2 * max(constants, default=0) + 1 if lengths else 0
    *others, queries, keys = map(hint, value_of(mask).shape)
    if math.prod(others) * (queries + beyond) * (keys + beyond) > LARGEST:
        return "the mask is too large to be computed"
    found = set()
    for more in {0, beyond}:
        sizes = {node: size + more * (node in lengths) for node, size in symbols.items()}
        found.add(_kind(_computed(nodes, sizes)))
    return found.pop() if len(found) == 1 else "the mask hides other keys at other lengths"


def _free_lengths(value: Tensor, symbols: Mapping[fx.Node, int]) -> list[fx.Node] | None:
    """The inputs that are a mask's free numbers of queries and keys; None if they are computed."""
    free = {str(size) for size in value.shape[-2:] if isinstance(size, torch.SymInt)}
    found = [node for node in symbols if str(value_of(node)) in free]
    return found if len({str(value_of(node)) for node in found}) == len(free) else None


def _numbers(node: fx.Node) -> list[int]:
    found: list[int] = []
    fx.node.map_aggregate(
        (node.args, node.kwargs),
        lambda each: found.append(each) if type(each) is int and abs(each) < 2**31 else None,
    )
    return found


def _computed(nodes: list[fx.Node], sizes: Mapping[fx.Node, int]) -> Tensor:
    """The last node's value, with nothing kept that is no longer needed."""
    values: dict[fx.Node, Any] = dict(sizes)
    inside = set(nodes)
    readers = {node: sum(user in inside for user in node.users) for node in nodes}
    for node in nodes:
        if node.op == "placeholder":
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "call_method":
            values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            target: Any = node.target
            values[node] = target(*args, **kwargs)
        for source in node.all_input_nodes:
            readers[source] -= 1
            if not readers[source]:
                del values[source]
    result: Tensor = values[nodes[-1]]
    return result


def _kind(mask: Tensor) -> str:
    queries, keys = mask.shape[-2:]
    if mask.dtype != torch.bool:
        hidden = mask < SMALL
        if not (hidden | (mask == 0)).all():
            return "the mask changes scores by other amounts than 0 and minus infinity"
        mask = ~hidden
    if mask.all():
        return "full"
    if queries == keys and (mask == torch.ones(queries, keys, dtype=torch.bool).tril()).all():
        return "causal"
    return "the mask is neither causal nor empty"
