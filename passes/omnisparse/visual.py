"""Which tokens of a multimodal model are visual, found where the graph puts them in.

transformers' vision-language models write the features of pictures and videos over the embeddings
of placeholder tokens, by `masked_scatter`. Its mask says, at run time, which tokens those are.
"""

from __future__ import annotations

from torch import Tensor, fx

from ..graph.facts import changed_in_place
from ..graph.nodes import ancestors, call_name, value_of

__all__ = ["visual_masks"]


def visual_masks(query: fx.Node) -> tuple[fx.Node, ...]:
    """The masks [batch, queries, 1 or more], of features that were put in before a query [batch,
    heads, queries, width] was computed: one for pictures, say, and one for videos."""
    nodes = query.graph.nodes
    scatters = [node for node in nodes if call_name(node).partition(".")[0] == "masked_scatter"]
    if not scatters:
        return ()
    batch, _, queries, _ = value_of(query).shape
    needed = ancestors([query])
    found = []
    for node in scatters:
        if node not in needed:
            continue
        mask = node.kwargs.get("mask", node.args[1] if len(node.args) > 1 else None)
        value = value_of(mask) if isinstance(mask, fx.Node) else None
        if isinstance(value, Tensor) and value.dim() == 3 and value.shape[:2] == (batch, queries):
            found.append(mask)
    return () if changed_in_place(found, query.graph) else tuple(found)
