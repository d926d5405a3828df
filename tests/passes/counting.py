"""A backend of one rewrite of a graph, and how much it rewrote."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx


def counting(
    rewrite: Callable[[fx.Graph], int],
) -> tuple[Callable[[fx.GraphModule, list[Any]], Callable[..., Any]], list[int]]:
    """The backend, and the list that it adds each graph's count to."""
    counts: list[int] = []

    def backend(module: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        counts.append(rewrite(module.graph))
        module.graph.lint()
        module.recompile()
        return module

    return backend, counts
