"""Attention masks that a graph builds: what they hide, proven for all sizes and all inputs.

A mask's entry is read as a function of batch, head, query and key (see `elements`): a diagram of
conditions, each of which compares numbers that are linear in these and in the graph's sizes, or is
an entry of a table that the graph has. The mask is known if it hides just the keys that come after
a query, or none, and besides, for all queries of a sample alike, the keys for which such entries
say so. A mask of fixed sizes that nothing enters may also be computed, where no rule knows how it
is made: that tells all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from ...graph.facts import changed_in_place
from ...graph.nodes import call_name, value_of
from .cases import Condition, Entry, If, TooManyCasesError, Value, combine
from .elements import Elements, UnknownError
from .linear import Linear, size_of
from .rules import rule_of

__all__ = ["Mask", "read_mask"]

SMALL = -1e4  # a score that is lowered by more is hidden
INDICES = ("batch", "head", "query", "key")
# A mask of as many queries as keys is larger than any memory if it has more.
MOST_POSITIONS = 2**23
LONGEST = 2**40


class Mask(NamedTuple):
    """kind: "causal", "full" (nothing is hidden), or why that is not known.

    valid: which keys are not hidden besides: a diagram of entries of bool tensors, whose indices
    are "batch", "key" or fixed numbers; None where all are.
    lowered: by how much scores are lowered where a key is hidden; -inf where it is left out.
    """

    kind: str
    valid: Value | None = None
    lowered: float = -torch.inf


class _RefusedError(Exception):
    """Why a mask is not known."""


def read_mask(mask: fx.Node, shape: Sequence[Any]) -> Mask:
    """What a mask hides from scores of the shape [batch, heads, queries, keys]."""
    elements = _elements(mask, shape)
    try:
        value = elements.broadcast(mask, tuple(Linear.of(each) for each in INDICES))
        change = changed_in_place(elements.seen, mask.graph)  # as by `mask[:, 5:] = False`
        if change is not None:
            raise _RefusedError(f"the mask is changed in place ({change.name})")
        return _known(elements, mask, value)
    except _RefusedError as reason:
        return Mask(str(reason))
    except (UnknownError, TooManyCasesError):
        return Mask("the mask distinguishes too many cases")


def _elements(mask: fx.Node, shape: Sequence[Any]) -> Elements:
    sizes = {name: size_of(size) for name, size in zip(INDICES, shape, strict=True)}
    ranges: dict[str, tuple[int, int]] = {}
    for size in sizes.values():
        for symbol in () if size is None else size.variables():
            ranges[symbol] = 0, LONGEST
    queries, keys = sizes["query"], sizes["key"]
    if queries is not None and queries == keys:
        for symbol, factor in queries.terms:
            if factor > 0 and len(queries.terms) == 1 and queries.constant >= 0:
                ranges[symbol] = 0, MOST_POSITIONS
    for name, size in sizes.items():
        longest = LONGEST if size is None else size.bounds(ranges)[1]
        ranges[name] = 0, longest - 1
    return Elements(rule_of, sizes, ranges)


def _known(elements: Elements, mask: fx.Node, value: Value) -> Mask:
    later = Linear.of("key") - Linear.of("query") - 1
    value = elements.pruned(value)
    seen = combine(_is_seen, value)
    earlier_keys = elements.pruned(seen, -later - 1)
    none_later = elements.impossible([later])
    later_keys = earlier_keys if none_later else elements.pruned(seen, later)
    for condition in {*_conditions(earlier_keys), *_conditions(later_keys)}:
        _check(elements, condition)
    if earlier_keys is False:
        raise _RefusedError("the mask hides all keys")
    if later_keys not in (earlier_keys, False):
        raise _RefusedError("the mask is neither causal nor empty")
    kind = "full" if later_keys == earlier_keys else "causal"
    if earlier_keys is True:
        return Mask(kind)
    amounts = {leaf for leaf in _leaves(value) if not _is_seen(leaf)}
    if len(amounts) > 1:
        raise _RefusedError("the mask hides some keys more than others")
    lowered = -torch.inf if value_of(mask).dtype == torch.bool else float(amounts.pop())
    return Mask(kind, earlier_keys, lowered)


def _is_seen(leaf: Value) -> bool:
    if isinstance(leaf, bool):
        return leaf
    if not isinstance(leaf, (int, float)) or not (leaf == 0 or leaf < SMALL):
        raise _RefusedError("the mask changes scores by other amounts than 0 and minus infinity")
    return leaf == 0


def _leaves(value: Value) -> set[Any]:
    return _leaves(value.yes) | _leaves(value.no) if isinstance(value, If) else {value}


def _conditions(value: Value) -> set[Condition]:
    if not isinstance(value, If):
        return set()
    return {value.condition} | _conditions(value.yes) | _conditions(value.no)


def _check(elements: Elements, condition: Condition) -> None:
    """Whether a condition says something of a key, whatever the query."""
    if not isinstance(condition, Entry):
        raise _RefusedError("the mask is neither causal nor empty")
    node = condition.node
    free = [each for each in condition.indices if each.terms]
    if not all(each in (Linear.of("batch"), Linear.of("key")) for each in free):
        if elements.computed(node) is not None:
            raise _RefusedError("the mask is neither causal nor empty")
        source = elements.source(node)
        raise _RefusedError(
            f"no rule says what {source.name} ({call_name(source)}) is, on which the mask depends"
            if source.op.startswith("call")
            else f"the mask depends on {source.name}, which hides other keys than its own"
        )
    for index, size in zip(condition.indices, value_of(node).shape, strict=True):
        if index.terms and size_of(size) != elements.sizes[index.terms[0][0]]:
            raise _RefusedError(f"{node.name} has another shape than batch and keys")
    if len(set(free)) < len(free):
        raise _RefusedError(f"the mask depends on {node.name}, which hides other keys than its own")
