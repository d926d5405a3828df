"""The OmniSparse pass: attention over long sequences looks only where it matters.

Calls of `scaled_dot_product_attention` become accel's two operators, one that selects and one that
attends. At run time each call decides by its own scores; where a selection would not pay, it stays
exact (see `accel.kernels.omnisparse`).
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import scaled_dot_product_attention

from ..kernels.omnisparse import DEVICES, Choice
from .base import PassResult, Program, Reason, Skip
from .effects import changed_in_place
from .graphs import call_name, copy_module, fake_mode, graph_modules, hint, value_of
from .masks import mask_kind

__all__ = ["OmniSparsePass"]

DEFAULTS = {
    "attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False,
}  # fmt: skip
ORDER = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


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
        kinds: dict[fx.Node, str] = {}
        for part in list(graph_modules(module)):
            for node in part.graph.find_nodes(
                op="call_function", target=scaled_dot_product_attention
            ):
                arguments = {**DEFAULTS, **dict(zip(ORDER, node.args, strict=False)), **node.kwargs}
                arguments |= _without_copies(arguments) | _fixed_numbers(arguments)
                refused = self._refusal(node, arguments, kinds)
                if refused is not None:
                    skipped.append(refused)
                    continue
                self._replace(part.graph, node, arguments)
                matched.append(node.name)
            part.recompile()
        if not matched:
            if not skipped:
                skipped.append(Skip(Reason.NO_ATTENTION, "no scaled_dot_product_attention"))
            return program, PassResult(self.name, skipped=tuple(skipped))
        details = {"calls": len(matched), "recall": self.choice.recall, "heads": self.choice.heads}
        result = PassResult(self.name, tuple(matched), tuple(skipped), details)
        return replace(program, module=module), result

    def _refusal(
        self, node: fx.Node, arguments: dict[str, Any], kinds: dict[fx.Node, str]
    ) -> Skip | None:
        """Why a call has to stay as it is; else `arguments` says whether it is causal.

        kinds: of the masks that were looked at; layers share them.
        """

        def refuse(reason: Reason, detail: str) -> Skip:
            return Skip(reason, detail, node.name)

        query, key, value = (value_of(arguments[name]) for name in ORDER[:3])
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
        if query.device.type not in DEVICES:
            return refuse(Reason.DEVICE, f"there is no kernel for {query.device.type}")
        if hint(key.shape[2]) < self.minimum:
            return refuse(
                Reason.SHORT, f"{hint(key.shape[2])} keys, fewer than minimum = {self.minimum}"
            )
        mask = arguments["attn_mask"]
        if mask is None:
            return None
        if mask not in kinds:
            kinds[mask] = mask_kind(mask)  # takes time, so all other reasons come first
        kind = kinds[mask]
        if kind not in ("causal", "full") or arguments["is_causal"]:
            return refuse(Reason.MASK, kind)
        arguments["is_causal"] = kind == "causal"
        return None

    def _replace(self, graph: fx.Graph, node: fx.Node, arguments: dict[str, Any]) -> None:
        query, key, value = (arguments[name] for name in ORDER[:3])
        scale, choice = arguments["scale"], self.choice
        if scale is None:
            scale = 1 / math.sqrt(value_of(query).shape[-1])
        is_causal = arguments["is_causal"]
        with graph.inserting_before(node):
            detached = [_call(graph, torch.Tensor.detach, each) for each in (query, key)]
            selection = _call(
                graph, torch.ops.accel.omnisparse_select.default, *detached, None, is_causal, scale,
                *choice.selecting(),
            )  # fmt: skip
            chosen = [_call(graph, operator.getitem, selection, index) for index in range(2)]
            results = _call(
                graph, torch.ops.accel.omnisparse_attend.default, query, key, value, *chosen, None,
                is_causal, scale, *choice.attending(),
            )  # fmt: skip
            output = _call(graph, operator.getitem, results, 0)
        for new in (*detached, selection, *chosen, results, output):
            for name in ("nn_module_stack", "stack_trace", "source_fn_stack"):
                if name in node.meta:
                    new.meta[name] = node.meta[name]
        node.replace_all_uses_with(output)
        graph.erase_node(node)


def _fixed_numbers(arguments: dict[str, Any]) -> dict[str, float]:
    """Numbers that Dynamo left free (dynamic=True), with a guard; operators take plain ones."""
    return {
        name: float(value_of(arguments[name]))
        for name in ("scale", "dropout_p")
        if isinstance(arguments[name], fx.Node)
    }


def _without_copies(arguments: dict[str, Any]) -> dict[str, Any]:
    """Key and value as they were before their heads were repeated for the query heads.

    transformers repeats them (`repeat_kv`): a new dimension, expanded and merged with the heads.
    """
    found = {}
    for name in ("key", "value"):
        merged = arguments[name]
        source = _repeated(merged) if isinstance(merged, fx.Node) else None
        if source is None:
            return {}
        found[name] = source
    return found


def _repeated(merged: fx.Node) -> fx.Node | None:
    expanded = merged.all_input_nodes[0] if call_name(merged) in ("reshape", "flatten") else None
    if expanded is None or call_name(expanded) != "expand":
        return None
    lifted = expanded.all_input_nodes[0]
    if call_name(lifted) != "getitem" or len(lifted.all_input_nodes) != 1:
        return None  # with a tensor as index it may reorder
    source = lifted.all_input_nodes[0]
    before, between, after = (value_of(node) for node in (source, expanded, merged))
    if not all(isinstance(each, Tensor) for each in (before, between, after)) or before.dim() != 4:
        return None
    batch, heads, tokens, width = before.shape
    lifts = value_of(lifted).shape == (batch, heads, 1, tokens, width)
    expands = between.dim() == 5 and between.shape[:2] == (batch, heads)
    merges = after.shape == (batch, heads * between.shape[2], tokens, width)
    if not (lifts and expands and merges):
        return None
    return None if changed_in_place([source, merged], merged.graph) else source


def _call(graph: fx.Graph, function: Any, *arguments: Any) -> fx.Node:
    """A call with the fake value of its result."""
    node = graph.call_function(function, arguments)
    values = fx.node.map_arg(arguments, value_of)
    with fake_mode(graph):
        node.meta["example_value"] = function(*values)
    return node
