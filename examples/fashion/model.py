"""The reference diffusion transformer: diffusers' DiT as a class-conditional rectified flow.

Small model trained by us on real data (Fashion-MNIST, `train_dit.py`); not a pretrained model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CHECKPOINT = Path(__file__).parent / "dit.safetensors"
NO_CLASS = 10  # the label that stands for "no class" in classifier-free guidance


def build() -> nn.Module:
    """The untrained network: 12 blocks, width 128, 49 tokens of 4x4 pixels."""
    try:
        from diffusers import DiTTransformer2DModel
    except ImportError as error:
        raise ImportError(
            "The reference model is diffusers' DiT: pip install 'accel-compiler[examples]'"
        ) from error
    network: Any = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=12,
        sample_size=28,
        patch_size=4,
        num_embeds_ada_norm=10,
    )
    return network


def load(path: Path = CHECKPOINT) -> nn.Module:
    """The trained network in float32, in evaluation mode."""
    from safetensors.torch import load_file

    model = build()
    weights = {name: value.float() for name, value in load_file(path).items()}
    model.load_state_dict(weights)
    return model.eval()


def example() -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Inputs to export the network with; two rows are enough, as sizes above 1 stay free."""
    kwargs = {"timestep": torch.full((2,), 1000.0), "class_labels": torch.tensor([0, 1])}
    return (torch.randn(2, 1, 28, 28),), kwargs


def timesteps(steps: int) -> Tensor:
    """`steps + 1` times from 1 (noise) to 0 (image), evenly spaced; the model sees 1000 times t."""
    return torch.linspace(1.0, 0.0, steps + 1)


@torch.no_grad()
def sample(
    model: Callable[..., Sequence[Tensor]],
    noise: Tensor,
    labels: Tensor,
    *,
    steps: int = 20,
    guidance: float = 2.0,
    times: Tensor | None = None,
) -> Iterator[Tensor]:
    """Euler steps of the flow with fused classifier-free guidance; yields the state after each.

    noise `[batch, 1, 28, 28]`, labels `[batch]`. The last item yielded is the picture in [-1, 1].
    `times` replaces the even spacing (a decreasing tensor that ends in 0).
    """
    times = timesteps(steps) if times is None else times
    both_labels = torch.cat([labels, torch.full_like(labels, NO_CLASS)])
    state = noise
    for now, after in itertools.pairwise(times):
        velocity = model(
            torch.cat([state, state]),
            timestep=(now * 1000).expand(2 * len(labels)),
            class_labels=both_labels,
            return_dict=False,
        )[0]
        conditional, unconditional = velocity.chunk(2)
        velocity = unconditional + guidance * (conditional - unconditional)
        state = state + (after - now) * velocity
        yield state
