"""What recognising a run costs a call: `python -m accel.examples.runs.cost`.

The reference model, and diffusers' DiT-B/2 with random weights at the size that it is trained for,
with guidance in one call, as they are compiled by default; of each number of pictures the
milliseconds that a call spends around the graph, medians of 60 calls, and the share of a computed
step's that this is.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import nn

from ...compiler.runtime.sampling import PadeGraph, graphs_of
from ..fashion import model as reference
from ..fashion.bench.subjects import random_dit_b2

__all__ = ["measured"]

STEPS, RUNS = 20, 4  # the first run compiles


@torch.no_grad()
def sampled(fast: Any, shape: tuple[int, ...], nothing: int, pictures: int) -> None:
    """One run. nothing: the label of no class."""
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(pictures, *shape, generator=generator)
    labels = torch.arange(pictures) % 10
    both = torch.cat([labels, torch.full_like(labels, nothing)])
    for step in range(STEPS):
        times = torch.full((2 * pictures,), 1000 * (1 - step / STEPS))
        twice = torch.cat([state, state])
        outputs = fast(twice, timestep=times, class_labels=both, return_dict=False)[0]
        yes, no = outputs.chunk(2)
        state = state - (no + 2 * (yes - no)) / STEPS


def measured(
    model: nn.Module, shape: tuple[int, ...], nothing: int, pictures: int
) -> tuple[float, float]:
    """Milliseconds around the graph, and of a computed step in it."""
    torch.compiler.reset()
    fast = torch.compile(model, backend="accel", fullgraph=True)
    sampled(fast, shape, nothing, pictures)
    ((graph, _),) = graphs_of(frozenset(map(id, model.parameters())))
    inside: list[float] = []
    around: list[float] = []
    function, call = graph.function, PadeGraph.__call__

    def timed(*inputs: Any) -> Any:
        begun = time.perf_counter()
        results = function(*inputs)
        inside.append(1000 * (time.perf_counter() - begun))
        return results

    def whole(self: PadeGraph, *inputs: Any) -> Any:
        begun = time.perf_counter()
        results = call(self, *inputs)
        around.append(1000 * (time.perf_counter() - begun) - inside[-1])
        return results

    graph.function = timed
    PadeGraph.__call__ = whole  # type: ignore[method-assign]  # a callable's is looked up there
    try:
        for _ in range(1, RUNS):
            sampled(fast, shape, nothing, pictures)
    finally:
        PadeGraph.__call__ = call  # type: ignore[method-assign]  # as above
    computed = sorted(inside)[-8 * (RUNS - 1) :]  # 8 of 20, and they take longest
    return statistics.median(around), statistics.median(computed)


def main() -> None:
    """Print a line for each model and number of pictures."""
    for name, load, shape, nothing, numbers in (
        ("reference model", reference.load, (1, 28, 28), 10, (1, 4, 40)),
        ("DiT-B/2, 256 pixels", lambda: random_dit_b2(32), (4, 32, 32), 1000, (1, 4)),
    ):
        for pictures in numbers:
            cost, step = measured(load(), shape, nothing, pictures)
            print(
                f"{name}, {pictures} pictures: {cost:.1f} ms a call, "
                f"{cost / step:.1%} of a computed step ({step:.0f} ms)"
            )


if __name__ == "__main__":
    main()
