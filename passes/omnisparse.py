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
from .graph.emit import emit
from .graph.facts import Memory
from .graph.nodes import copy_module, graph_modules, hint, value_of
from .masks import Mask, read_mask
from .visual import visual_masks

__all__ = ["OmniSparsePass"]


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
        masks: dict[fx.Node, Mask] = {}
        visual: set[str] = set()
        for part in list(graph_modules(module)):
            tables: dict[tuple[fx.Node, ...], fx.Node] = {}
            memory = Memory(part.graph)  # what is put in writes nothing, so this stays true
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
                output = self._replace(part.graph, attention, arguments)
                memory.stands_for(output, attention.node)
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
        self, attention: Attention, arguments: dict[str, Any], masks: dict[fx.Node, Mask]
    ) -> Skip | None:
        """Why a call has to stay as it is; else `arguments` says whether it is causal, and names
        the padding.

        masks: those that were looked at; layers share them.
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
        arguments["padding"] = None
        if mask is None:
            return None
        if mask not in masks:
            masks[mask] = read_mask(mask)  # takes time, so all other reasons come first
        kind, padding = masks[mask]
        if kind not in ("causal", "full") or arguments["is_causal"]:
            return refuse(Reason.MASK, kind)
        if padding is not None and value_of(padding).shape != (key.shape[0], key.shape[2]):
            return refuse(Reason.MASK, f"{padding.name} has another shape than batch and keys")
        arguments |= {"is_causal": kind == "causal", "padding": padding}
        return None

    def _replace(self, graph: fx.Graph, attention: Attention, arguments: dict[str, Any]) -> fx.Node:
        node = attention.node
        query, key, value = (arguments[name] for name in ("query", "key", "value"))
        scale, choice = arguments["scale"], self.choice
        if scale is None:
            scale = 1 / math.sqrt(value_of(query).shape[-1])
        is_causal = arguments["is_causal"]
        with graph.inserting_before(node):
            padding, valid = arguments["padding"], []
            if padding is not None:
                valid = [emit(graph, torch.ne, padding, 0, like=node)]
            given = valid[0] if valid else None
            detached = [emit(graph, torch.Tensor.detach, each, like=node) for each in (query, key)]
            selection = emit(
                graph, torch.ops.accel.omnisparse_select.default, *detached, given, is_causal,
                scale, *choice.selecting(), like=node,
            )  # fmt: skip
            chosen = [emit(graph, operator.getitem, selection, i, like=node) for i in (0, 1)]
            results = emit(
                graph, torch.ops.accel.omnisparse_attend.default, query, key, value, *chosen, given,
                arguments["visual"], is_causal, scale, *choice.attending(),
                like=node,
            )  # fmt: skip
            output = emit(graph, operator.getitem, results, 0, like=node)
        node.replace_all_uses_with(output)
        for old in (node, *attention.inner):
            graph.erase_node(old)
        return output


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
