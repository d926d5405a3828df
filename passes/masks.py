"""Attention masks that a graph builds from sizes and, at most, a table of padding: what they hide.

Libraries build causal masks from `arange` and comparisons in every captured graph. Such a mask is a
constant of the sizes, and computing it tells whether it is causal: for certain where sizes are
fixed, and at two telling lengths where they are free. If it also depends on an input of whole
numbers, [batch, keys], it is computed for several such inputs: each entry that is 0 has to hide one
key from all queries of its sample, and nothing else may change.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from .graph.facts import changed_in_place, is_pure
from .graph.nodes import ancestors, hint, is_model_state, value_of

__all__ = ["Mask", "read_mask"]

LARGEST = 2**30  # entries of a mask that is computed
SMALL = -1e4  # a score that is lowered by more is hidden


class Mask(NamedTuple):
    """kind: "causal", "full" (nothing is hidden), or why that is not known.

    padding: an input of whole numbers [batch, keys], whose zeros are keys that are hidden besides.
    """

    kind: str
    padding: fx.Node | None = None


def read_mask(mask: fx.Node) -> Mask:
    """What a mask hides.

    For free sizes it is computed at two lengths, of which one is more than twice any number in the
    code of the mask, so that a sliding window of that many keys would show.
    """
    needed = ancestors([mask])
    nodes = [node for node in mask.graph.nodes if node in needed]
    padding = None
    for node in nodes:
        if node.op == "placeholder" and isinstance(value_of(node), (int, torch.SymInt)):
            continue
        if padding is None and _may_be_padding(node, value_of(mask)):
            padding = node
        elif node.op in ("get_attr", "placeholder"):
            return Mask(f"the mask depends on {node.name}")
        if not is_pure(node):
            return Mask(f"computing the mask has side effects ({node.name})")
    change = changed_in_place(nodes, mask.graph)  # as by `mask[:, 5:] = False`
    if change is not None:
        return Mask(f"the mask is changed in place ({change.name})")
    symbols = {
        node: hint(value_of(node))
        for node in nodes if node.op == "placeholder" and node is not padding
    }  # fmt: skip
    lengths = _free_lengths(value_of(mask), symbols)
    if lengths is None:
        return Mask("the mask's sizes are computed from several free sizes")
    constants = [abs(each) for node in nodes for each in _numbers(node)]
    beyond = 2 * max(constants, default=0) + 1 if lengths else 0
    *others, queries, keys = map(hint, value_of(mask).shape)
    if math.prod(others) * (queries + beyond) * (keys + beyond) > LARGEST:
        return Mask("the mask is too large to be computed")
    found = set()
    for more in {0, beyond}:
        values: dict[fx.Node, Any] = {
            node: size + more * (node in lengths) for node, size in symbols.items()
        }
        if padding is None:
            found.add(_kind(_computed(nodes, values)))
        else:
            found.add(_padded_kind(nodes, values, padding, more))
    return Mask(found.pop() if len(found) == 1 else "the mask hides other keys at other lengths",
                padding)  # fmt: skip


def _may_be_padding(node: fx.Node, mask: Tensor) -> bool:
    value = value_of(node)
    return (
        node.op == "placeholder"
        and not is_model_state(node)
        and isinstance(value, Tensor)
        and not value.is_floating_point()
        and value.dim() == 2
        and value.shape[1] == mask.shape[-1]
    )


def _padded_kind(
    nodes: list[fx.Node], sizes: Mapping[fx.Node, Any], padding: fx.Node, more: int
) -> str:
    """What the mask is where nothing is padding, if padding hides its own keys and no others."""
    value = value_of(padding)
    shape = (
        hint(value.shape[0]),
        hint(value.shape[1]) + more * isinstance(value.shape[1], torch.SymInt),
    )
    everything = torch.ones(shape, dtype=value.dtype, device=value.device)
    plain = _hidden(_computed(nodes, {**sizes, padding: everything}))
    if isinstance(plain, str):
        return plain
    for table in _tables(everything):
        hidden = _hidden(_computed(nodes, {**sizes, padding: table}))
        if isinstance(hidden, str) or not hidden.equal(plain | (table == 0)[:, None, None]):
            return f"{padding.name} hides other keys than its own"
    return _kind(~plain)


def _tables(ones: Tensor) -> Iterator[Tensor]:
    """Telling tables of padding: scattered, with other numbers than 1, at the start, and only."""
    generator = torch.Generator().manual_seed(0)
    scattered = torch.randint(0, 3, ones.shape, generator=generator).to(ones)
    scattered[:, : ones.shape[1] // 3] = 0
    yield scattered
    yield torch.zeros_like(ones)


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


def _computed(nodes: list[fx.Node], sizes: Mapping[fx.Node, Any]) -> Tensor:
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


def _hidden(mask: Tensor) -> Tensor | str:
    """Which keys a mask hides; or why that can't be said."""
    if mask.dtype == torch.bool:
        return ~mask
    hidden = mask < SMALL
    if not (hidden | (mask == 0)).all():
        return "the mask changes scores by other amounts than 0 and minus infinity"
    return hidden


def _kind(mask: Tensor) -> str:
    hidden = _hidden(mask)
    if isinstance(hidden, str):
        return hidden
    queries, keys = hidden.shape[-2:]
    if not hidden.any():
        return "full"
    later = torch.ones(queries, keys, dtype=torch.bool, device=hidden.device).triu(1)
    if queries == keys and (hidden == later).all():
        return "causal"
    return "the mask is neither causal nor empty"
