"""The OmniSparse pass: attention over long sequences looks only where it matters.

Attention becomes accel's two operators, one that selects and one that attends. At run time each
call decides by its own scores; where a selection would not pay, it stays exact (see
`accel.kernels.omnisparse`).
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ...kernels.errors import OptionError
from ...kernels.omnisparse import DEVICES, Choice
from ..base import Feature, Pass, PassResult, Program, Reason, Skip
from ..graph.emit import emit
from ..graph.facts import Memory
from ..graph.nodes import copy_module, graph_modules, hint, value_of
from .attention import Attention, find_attention, without_copies
from .masks.cases import Entry, If, Value
from .masks.read import Mask, read_mask
from .visual import visual_masks

__all__ = ["OmniSparsePass"]

# Of scores that are added to an amount that hides; smaller ones leave no trace of it. A query that
# sees nothing is padding itself.
LARGEST_SCORE = 16.0


@dataclass(frozen=True)
class OmniSparsePass(Choice, Pass):
    """Replace attention calls of at least `minimum` keys; the other options are a selection's."""

    name: ClassVar[str] = "omnisparse"
    summary: ClassVar[str] = "attention looks only at the keys that matter"
    applies: ClassVar[str] = (
        "when asked for: attention of 1024 keys or more, causal or full, with or without padding, "
        "training included"
    )
    features: ClassVar[frozenset[Feature]] = frozenset({Feature.OPERATORS})

    minimum: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.minimum < 0:
            raise OptionError(f"minimum is {self.minimum}; it can't be negative")

    def run(self, program: Program) -> tuple[Program, PassResult]:
        """See the module's docstring. A call that is left alone is named, with the reason."""
        module, _ = copy_module(program.module)
        matched: list[str] = []
        skipped: list[Skip] = []
        masks: dict[tuple[fx.Node, str], Mask] = {}
        visual: set[str] = set()
        for part in list(graph_modules(module)):
            tables: dict[tuple[fx.Node, ...], fx.Node] = {}
            memory = Memory(part.graph)  # what is put in writes nothing, so this stays true
            seen: dict[Mask, tuple[fx.Node, fx.Node | None]] = {}
            for attention in find_attention(part.graph, memory):
                arguments = attention.arguments | without_copies(attention, memory)
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
                sees = seen.get(mask, (None, None))
                output = self._replace(part.graph, attention, arguments, *sees)
                memory.stands_for(output, attention.node)
                matched.append(attention.node.name)
            part.recompile()
        if not matched:
            if not skipped:
                skipped.append(Skip(Reason.NO_ATTENTION, "none that is known to the pass"))
            return program, PassResult(self.name, skipped=tuple(skipped))
        details = {
            "calls": len(matched), "recall": self.recall, "heads": self.heads,
            "may be lazy": f"those in {', '.join(sorted(visual))}" if visual else "all queries",
        }  # fmt: skip
        if self.span is not None:
            details["span"] = self.span
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
    ) -> fx.Node:
        """What takes the place of a call. valid, sees: as `_seen` makes them."""
        node = attention.node
        query, key, value = (arguments[name] for name in ("query", "key", "value"))
        scale = arguments["scale"]
        if scale is None:
            scale = 1 / math.sqrt(value_of(query).shape[-1])
        is_causal = arguments["is_causal"]
        with graph.inserting_before(node):
            detached = [emit(graph, torch.Tensor.detach, each, like=node) for each in (query, key)]
            selection = emit(
                graph, torch.ops.accel.omnisparse_select.default, *detached, valid, is_causal,
                scale, *self.selecting(), like=node,
            )  # fmt: skip
            chosen = [emit(graph, operator.getitem, selection, i, like=node) for i in (0, 1)]
            results = emit(
                graph, torch.ops.accel.omnisparse_attend.default, query, key, value, *chosen, valid,
                arguments["visual"], is_causal, scale, *self.attending(),
                like=node,
            )  # fmt: skip
            output = emit(graph, operator.getitem, results, 0, like=node)
            if sees is not None:
                mean = emit(graph, torch.mean, value, 2, True, like=node)
                group = value_of(query).shape[1] // value_of(value).shape[1]
                if group > 1:
                    mean = emit(graph, torch.repeat_interleave, mean, group, 1, like=node)
                output = emit(graph, torch.where, sees, output, mean, like=node)
        node.replace_all_uses_with(output)
        for old in (node, *attention.inner):
            graph.erase_node(old)
        return output


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
        one = emit(graph, torch.select, key, 1, 0)
        like = emit(graph, torch.select, one, -1, 0)
        valid = emit(graph, torch.Tensor.expand_as, _table(graph, mask.valid), like)
        if mask.lowered == -math.inf:
            return valid, None
        if mask.kind == "causal":
            count = emit(graph, torch.cumsum, valid, 1)
            sees = emit(graph, torch.gt, count, 0)
        else:
            sees = emit(graph, torch.any, valid, 1, True)
        return valid, emit(graph, operator.getitem, sees, (slice(None), None, slice(None), None))


def _table(graph: fx.Graph, valid: Value) -> Any:
    """A diagram of `Mask.valid`, computed for [batch or 1, keys or 1]; True and False as such."""
    if not isinstance(valid, If):
        return valid
    assert isinstance(valid.condition, Entry)
    table = _entries(graph, valid.condition)
    yes, no = _table(graph, valid.yes), _table(graph, valid.no)
    if no is False:
        return table if yes is True else emit(graph, torch.logical_and, table, yes)
    if yes is True:
        return emit(graph, torch.logical_or, table, no)
    opposite = emit(graph, torch.logical_not, table)
    if no is True:
        return opposite if yes is False else emit(graph, torch.logical_or, opposite, yes)
    other = emit(graph, torch.logical_and, opposite, no)
    if yes is False:
        return other
    return emit(graph, torch.logical_or, emit(graph, torch.logical_and, table, yes), other)


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
        table = emit(graph, operator.getitem, table, tuple(items))
    if "batch" in names and names.index("batch") > (*names, "key").index("key"):
        table = emit(graph, torch.transpose, table, 0, 1)
    return table


def _any(graph: fx.Graph, before: fx.Node, masks: tuple[fx.Node, ...]) -> fx.Node:
    """Where any of the masks [batch, tokens, 1 or more] is set, [batch, tokens]."""
    with graph.inserting_before(before):
        first, *others = (emit(graph, torch.any, mask, -1) for mask in masks)
        for other in others:
            first = emit(graph, torch.logical_or, first, other)
    return first


def _fixed_numbers(arguments: dict[str, Any]) -> dict[str, float]:
    """Numbers that Dynamo left free (dynamic=True), with a guard; operators take plain ones."""
    return {
        name: float(value_of(arguments[name]))
        for name in ("scale", "dropout_p")
        if isinstance(arguments[name], fx.Node)
    }
