"""The OmniSparse pass: attention over long sequences looks only where it matters.

Attention becomes accel's two operators, one that selects and one that attends. At run time each
call decides by its own scores; where a selection would not pay, it stays exact (see
`accel.kernels.omnisparse`).
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..kernels.omnisparse import DEVICES, Choice
from .attention import Attention, find_attention, without_copies
from .base import PassResult, Program, Reason, Skip
from .cases import Entry, If, Value
from .graphs import copy_module, fake_mode, graph_modules, hint, value_of
from .masks import Mask, read_mask
from .visual import visual_masks

__all__ = ["OmniSparsePass"]

# Of scores that are added to an amount that hides; smaller ones leave no trace of it. A query that
# sees nothing is padding itself.
LARGEST_SCORE = 16.0


@dataclass(frozen=True)
class OmniSparsePass:
    """Replace attention calls of at least `minimum` keys."""

    choice: Choice
    minimum: int = 1024
    name: str = "omnisparse"

    def run(self, program: Program) -> tuple[Program, PassResult]:
        """See the module's docstring. A call that is left alone is named, with the reason."""
        module, _ = copy_module(program.module)
        matched: list[str] = []
        skipped: list[Skip] = []
        masks: dict[tuple[fx.Node, str], Mask] = {}
        visual: set[str] = set()
        for part in list(graph_modules(module)):
            tables: dict[tuple[fx.Node, ...], fx.Node] = {}
            seen: dict[Mask, tuple[fx.Node, fx.Node | None]] = {}
            for attention in find_attention(part.graph):
                arguments = attention.arguments | without_copies(attention)
                arguments |= _fixed_numbers(arguments)
                refused = self._refusal(attention, arguments, masks)
                if refused is not None:
                    skipped.append(refused)
                    continue
                given = visual_masks(arguments["query"])
                if given and given not in tables:  # for all layers that follow
                    tables[given] = _any(part.graph, attention.node, given)
                visual |= {mask.name for mask in given}
                arguments["visual"] = tables.get(given)
                mask = arguments["mask"]
                if mask is not None and mask.valid is not None and mask not in seen:
                    seen[mask] = _seen(part.graph, attention.node, mask, arguments["key"])
                self._replace(part.graph, attention, arguments, *seen.get(mask, (None, None)))
                matched.append(attention.node.name)
            part.recompile()
        if not matched:
            if not skipped:
                skipped.append(Skip(Reason.NO_ATTENTION, "none that is known to the pass"))
            return program, PassResult(self.name, skipped=tuple(skipped))
        details = {
            "calls": len(matched), "recall": self.choice.recall, "heads": self.choice.heads,
            "may be lazy": f"those in {', '.join(sorted(visual))}" if visual else "all queries",
        }  # fmt: skip
        if self.choice.span is not None:
            details["span"] = self.choice.span
        result = PassResult(self.name, tuple(matched), tuple(skipped), details)
        return replace(program, module=module), result

    def _refusal(
        self,
        attention: Attention,
        arguments: dict[str, Any],
        masks: dict[tuple[fx.Node, str], Mask],
    ) -> Skip | None:
        """Why a call has to stay as it is; else `arguments` says whether it is causal, and what its
        mask is.

        masks: those that were looked at, by what they are used for; layers share them.
        """

        def refuse(reason: Reason, detail: str) -> Skip:
            return Skip(reason, detail, attention.node.name)

        if attention.obstacle:
            return refuse(Reason.ATTENTION_FORM, attention.obstacle)
        query, key, value = (value_of(arguments[name]) for name in ("query", "key", "value"))
        if not all(isinstance(each, Tensor) and each.dim() == 4 for each in (query, key, value)):
            return refuse(Reason.ATTENTION_FORM, "not [batch, heads, tokens, width]")
        if arguments["dropout_p"] != 0:
            return refuse(Reason.ATTENTION_FORM, f"dropout of {arguments['dropout_p']}")
        if not isinstance(arguments["is_causal"], bool):
            return refuse(Reason.ATTENTION_FORM, "is_causal is known at run time only")
        if key.shape != value.shape or query.shape[-1] != key.shape[-1]:
            return refuse(Reason.ATTENTION_FORM, "values of another width than keys")
        if query.shape[0] != key.shape[0] or query.shape[1] % key.shape[1]:
            return refuse(Reason.ATTENTION_FORM, "query and key heads that have to be broadcast")
        if arguments["is_causal"] and query.shape[2] != key.shape[2]:
            return refuse(Reason.ATTENTION_FORM, "causal attention of fewer queries than keys")
        given = [query, key, value, value_of(attention.node)]
        types = {each.dtype for each in given if isinstance(each, Tensor)}
        if len(types) > 1:  # autocast would make them one
            return refuse(Reason.ATTENTION_FORM, f"of several types: {sorted(map(str, types))}")
        if query.device.type != "cpu" and query.dtype == torch.float64:
            return refuse(Reason.DEVICE, "there is no kernel for float64")
        if query.device.type not in DEVICES:
            return refuse(Reason.DEVICE, f"there is no kernel for {query.device.type}")
        if hint(key.shape[2]) < self.minimum:
            return refuse(
                Reason.SHORT, f"{hint(key.shape[2])} keys, fewer than minimum = {self.minimum}"
            )
        mask = arguments["attn_mask"]
        arguments["mask"] = None
        if mask is None:
            return None
        if arguments["is_causal"]:
            return refuse(Reason.MASK, "both a mask and is_causal")
        shape = (*query.shape[:3], key.shape[2])
        if value_of(attention.node).shape[:3] != query.shape[:3] or value_of(mask).dim() > 4:
            return refuse(Reason.MASK, "the mask is for more scores than there are")
        if attention.inner and value_of(mask).dtype == torch.bool:
            return refuse(Reason.MASK, "a mask of bools that is added")
        place = mask, str(shape)
        if place not in masks:  # takes time, so all other reasons come first
            masks[place] = read_mask(mask, shape)
        found = masks[place]
        if found.kind not in ("causal", "full"):
            return refuse(Reason.MASK, found.kind)
        if found.kind == "causal" and query.shape[2] != key.shape[2]:
            return refuse(Reason.ATTENTION_FORM, "causal attention of fewer queries than keys")
        added = torch.promote_types(query.dtype, value_of(mask).dtype)
        if not attention.inner:  # kernels add in at least this
            added = torch.promote_types(added, torch.float32)
        if found.valid is not None and -found.lowered * torch.finfo(added).eps < LARGEST_SCORE:
            return refuse(
                Reason.MASK,
                f"a query of which all keys are hidden sees them: {found.lowered} is too little",
            )
        arguments |= {"is_causal": found.kind == "causal", "mask": found}
        return None

    def _replace(
        self,
        graph: fx.Graph,
        attention: Attention,
        arguments: dict[str, Any],
        valid: fx.Node | None,
        sees: fx.Node | None,
    ) -> None:
        """valid, sees: as `_seen` makes them."""
        node = attention.node
        query, key, value = (arguments[name] for name in ("query", "key", "value"))
        scale, choice = arguments["scale"], self.choice
        if scale is None:
            scale = 1 / math.sqrt(value_of(query).shape[-1])
        is_causal = arguments["is_causal"]
        with graph.inserting_before(node):
            detached = [_call(graph, torch.Tensor.detach, each) for each in (query, key)]
            selection = _call(
                graph, torch.ops.accel.omnisparse_select.default, *detached, valid, is_causal,
                scale, *choice.selecting(),
            )  # fmt: skip
            chosen = [_call(graph, operator.getitem, selection, index) for index in range(2)]
            results = _call(
                graph, torch.ops.accel.omnisparse_attend.default, query, key, value, *chosen, valid,
                arguments["visual"], is_causal, scale, *choice.attending(),
            )  # fmt: skip
            output = _call(graph, operator.getitem, results, 0)
            added = [*detached, selection, *chosen, results, output]
            if sees is not None:
                mean = _call(graph, torch.mean, value, 2, True)
                group = value_of(query).shape[1] // value_of(value).shape[1]
                if group > 1:
                    added.append(mean)
                    mean = _call(graph, torch.repeat_interleave, mean, group, 1)
                output = _call(graph, torch.where, sees, output, mean)
                added += [mean, output]
        for new in added:
            for name in ("nn_module_stack", "stack_trace", "source_fn_stack"):
                if name in node.meta:
                    new.meta[name] = node.meta[name]
        node.replace_all_uses_with(output)
        for old in (node, *attention.inner):
            graph.erase_node(old)


def _seen(
    graph: fx.Graph, before: fx.Node, mask: Mask, key: fx.Node
) -> tuple[fx.Node, fx.Node | None]:
    """Which keys a mask does not hide besides, bool [batch, keys], and which queries see any at
    all, bool [batch, 1, queries or 1, 1].

    The latter only where scores are lowered by a number. One so large is all that remains of a
    score, so a query that is to see nothing sees all keys alike; the operator's result is 0, as
    torch's is of scores that are minus infinity.
    """
    assert mask.valid is not None
    with graph.inserting_before(before):
        one = _call(graph, torch.select, key, 1, 0)
        like = _call(graph, torch.select, one, -1, 0)
        valid = _call(graph, torch.Tensor.expand_as, _table(graph, mask.valid), like)
        if mask.lowered == -math.inf:
            return valid, None
        if mask.kind == "causal":
            count = _call(graph, torch.cumsum, valid, 1)
            sees = _call(graph, torch.gt, count, 0)
        else:
            sees = _call(graph, torch.any, valid, 1, True)
        return valid, _call(graph, operator.getitem, sees, (slice(None), None, slice(None), None))


def _table(graph: fx.Graph, valid: Value) -> Any:
    """A diagram of `Mask.valid`, computed for [batch or 1, keys or 1]; True and False as such."""
    if not isinstance(valid, If):
        return valid
    assert isinstance(valid.condition, Entry)
    table = _entries(graph, valid.condition)
    yes, no = _table(graph, valid.yes), _table(graph, valid.no)
    if no is False:
        return table if yes is True else _call(graph, torch.logical_and, table, yes)
    if yes is True:
        return _call(graph, torch.logical_or, table, no)
    opposite = _call(graph, torch.logical_not, table)
    if no is True:
        return opposite if yes is False else _call(graph, torch.logical_or, opposite, yes)
    other = _call(graph, torch.logical_and, opposite, no)
    if yes is False:
        return other
    return _call(graph, torch.logical_or, _call(graph, torch.logical_and, table, yes), other)


def _entries(graph: fx.Graph, entry: Entry) -> fx.Node:
    """All that an entry may be, bool [batch or 1, keys or 1]."""
    table = entry.node
    names = [index.terms[0][0] if index.terms else "" for index in entry.indices]
    items: list[Any] = [
        slice(None) if name else index.constant
        for name, index in zip(names, entry.indices, strict=True)
    ]
    if "batch" not in names:
        items.insert(0, None)
    if "key" not in names:
        items.append(None)
    if items != [slice(None)] * 2:
        table = _call(graph, operator.getitem, table, tuple(items))
    if "batch" in names and names.index("batch") > (*names, "key").index("key"):
        table = _call(graph, torch.transpose, table, 0, 1)
    return table


def _any(graph: fx.Graph, before: fx.Node, masks: tuple[fx.Node, ...]) -> fx.Node:
    """Where any of the masks [batch, tokens, 1 or more] is set, [batch, tokens]."""
    with graph.inserting_before(before):
        first, *others = (_call(graph, torch.any, mask, -1) for mask in masks)
        for other in others:
            first = _call(graph, torch.logical_or, first, other)
    return first


def _fixed_numbers(arguments: dict[str, Any]) -> dict[str, float]:
    """Numbers that Dynamo left free (dynamic=True), with a guard; operators take plain ones."""
    return {
        name: float(value_of(arguments[name]))
        for name in ("scale", "dropout_p")
        if isinstance(arguments[name], fx.Node)
    }


def _call(graph: fx.Graph, function: Any, *arguments: Any) -> fx.Node:
    """A call with the fake value of its result."""
    node = graph.call_function(function, arguments)
    values = fx.node.map_arg(arguments, value_of)
    with fake_mode(graph):
        node.meta["example_value"] = function(*values)
    return node
