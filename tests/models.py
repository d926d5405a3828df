"""Small real models of diffusers for the tests, and a way to drive one through a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accel.passes import Program
from torch import Tensor, nn


def dit(blocks: int = 2, seed: int = 0) -> nn.Module:
    """diffusers' DiT: 2 heads of 16, 16 tokens, with gates that let every block matter."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(seed)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=2,
        out_channels=2,
        num_layers=blocks,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    ).eval()


def noise(batch: int = 2, seed: int = 1, size: int = 8) -> Tensor:
    """A starting sample for `dit`."""
    return torch.randn(batch, 2, size, size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def euler(
    model: Callable[..., Any],
    start: Tensor,
    labels: Tensor,
    *,
    steps: int = 20,
    times: Sequence[float] | None = None,
) -> list[Tensor]:
    """Plain Euler steps of a flow, without guidance; the model's output at each step."""
    times = [1 - i / steps for i in range(steps)] if times is None else times
    state, outputs = start, []
    for now, after in zip(times, [*times[1:], 0.0], strict=True):
        timestep = torch.full((len(start),), now * 1000)
        velocity = model(state, timestep=timestep, class_labels=labels, return_dict=False)[0]
        outputs.append(velocity)
        state = state + (after - now) * velocity * 0.3
    return outputs


@contextmanager
def without_blocks(model: nn.Module) -> Iterator[None]:
    """In the graphs of a model with the "eager" lowering, the blocks may not be run."""
    from accel.compiler.runtime.sampling import graphs_of

    graphs = graphs_of(frozenset(map(id, model.parameters())))
    assert graphs

    def forbidden(*operands: Any) -> Any:
        raise AssertionError("the blocks were run")

    changed = []
    for graph, _ in graphs:
        module: Any = graph.function  # what "eager" gives is the graph's module itself
        for name, blocks in module.named_children():
            if name.startswith("accel_blocks"):
                changed.append((blocks, blocks.forward))
                blocks.forward = forbidden
    assert changed
    try:
        yield
    finally:
        for blocks, forward in changed:
            blocks.forward = forward


def relative(left: Tensor, right: Tensor) -> float:
    """Relative L2 distance."""
    return float((left - right).detach().norm() / right.detach().norm())


def program_of(model: nn.Module, *given: Any, **named: Any) -> Program:
    """The program of the only graph in which Dynamo captures a model."""
    found: list[Program] = []

    def collect(module: torch.fx.GraphModule, _: Any) -> Any:
        found.append(Program.capture(module))
        return module.forward

    torch._dynamo.reset()
    torch.compile(model, backend=collect, fullgraph=True)(*given, **named)
    (program,) = found
    return program
