"""What the zoo is made of: an entry, and the inputs and settings that many entries share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

Inputs = dict[str, Any]

TEXT_TOKENS = 6  # tokens of a prompt
IMAGE_TOKENS = 16  # tokens of an image: 8x8 latents in patches of 2x2


@dataclass(frozen=True)
class Entry:
    """One class of the zoo: how to build a small model of it and how to call it."""

    class_name: str
    """The name in diffusers."""
    config: dict[str, Any]
    """Keyword arguments of the constructor."""
    inputs: Callable[[int], Inputs]
    """Batch size -> keyword arguments of `forward`; the same values in every call."""
    timestep: str = "timestep"
    """The keyword that carries the timestep."""
    latent: str = "hidden_states"
    """The keyword that carries the noisy latent."""

    def build(self) -> torch.nn.Module:
        """A seeded model in eval mode, in which no parameter is all zeros or uninitialised."""
        from diffusers.models import transformers

        model: torch.nn.Module
        torch.manual_seed(0)
        with _empty_as_nan():
            model = getattr(transformers, self.class_name)(**self.config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Gates and output projections start at zero, a few parameters at torch.empty.
                if not parameter.any() or parameter.isnan().any():
                    parameter.normal_(std=0.02)
        return model


def next_inputs(entry: Entry, inputs: Inputs, outputs: Any, step: int) -> Inputs:
    """The inputs of the step after one with these inputs and outputs, by Euler's method."""
    made = tensors(outputs)

    def moved(sample: Tensor) -> Tensor:
        fitting = (each for each in made if each.dim() == sample.dim() and len(each) == len(sample))
        output = next(fitting, None)
        if output is None:
            return sample * 0.98
        box = tuple(slice(min(pair)) for pair in zip(sample.shape, output.shape, strict=True))
        result = sample.clone()
        result[box] -= 0.05 * output[box]
        return result

    following = step_inputs(entry, step)
    following[entry.latent] = tree_map(moved, inputs[entry.latent])
    return following


def step_inputs(entry: Entry, step: int) -> Inputs:
    """As the inputs of a sampling step: the time falls, the sample shrinks a little."""
    inputs = entry.inputs(2)
    inputs[entry.timestep] = inputs[entry.timestep] * (1 - step / 20)
    inputs[entry.latent] = tree_map(lambda x: x * (1 - 0.02 * step), inputs[entry.latent])
    return inputs


def tensors(outputs: Any) -> list[Tensor]:
    """The floating-point tensors of a model's result."""
    # Output classes are dicts of which pytree knows nothing.
    flat = tree_flatten(dict(outputs) if isinstance(outputs, dict) else outputs)[0]
    return [each for each in flat if isinstance(each, Tensor) and each.is_floating_point()]


@contextmanager
def _empty_as_nan() -> Iterator[None]:
    """Fill the floating point results of `torch.empty` with NaN."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal noise that depends on the shape and the seed only."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def at_time(batch: int, value: float = 500.0) -> torch.Tensor:
    """The same timestep for every sample, shape [batch]."""
    return torch.full((batch,), value)


def text_mask(batch: int, tokens: int = TEXT_TOKENS) -> torch.Tensor:
    """A boolean mask that hides the last token, as padding of a prompt would be."""
    return (torch.arange(tokens) < tokens - 1).repeat(batch, 1)


def grid_positions(*sizes: int) -> torch.Tensor:
    """The integer coordinates of a grid, shape [tokens, len(sizes)]."""
    return torch.cartesian_prod(*(torch.arange(size) for size in sizes))


def rotary_angles(tokens: int, dim: int) -> torch.Tensor:
    """Rotary angles of shape [tokens, dim]."""
    frequencies = 100.0 ** -torch.linspace(0, 1, dim)
    return torch.arange(tokens)[:, None] * frequencies


def rotary_pair(tokens: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The (cos, sin) pair of interleaved rotary embeddings, each [tokens, dim]."""
    angles = rotary_angles(tokens, dim // 2).repeat_interleave(2, dim=-1)
    return angles.cos(), angles.sin()


def allegro_rotary() -> tuple[Any, Any]:
    """Tables of (cos, sin) for each axis of a 2x4x4 grid of tokens, and the positions in them."""
    angles = rotary_angles(4, 2).repeat(1, 2)
    return ((angles.cos(), angles.sin()),) * 3, grid_positions(2, 4, 4).T[:, None]


def camera_inputs(batch: int) -> torch.Tensor:
    """Two frames of a pinhole camera at the origin: a 4x4 pose and (fx, fy, cx, cy)."""
    pose = torch.eye(4).flatten()
    return torch.cat([pose, torch.tensor([4.0, 4.0, 2.0, 2.0])]).repeat(batch, 2, 1)


def call_inputs(**inputs: Any) -> Inputs:
    """The inputs of a call that returns a tuple."""
    return {**inputs, "return_dict": False}


def image_latent(batch: int) -> torch.Tensor:
    return random_tensor(batch, 4, 8, 8)


def video_latent(batch: int, channels: int = 4, frames: int = 2) -> torch.Tensor:
    return random_tensor(batch, channels, frames, 8, 8)


def token_latent(batch: int, tokens: int = IMAGE_TOKENS, channels: int = 4) -> torch.Tensor:
    return random_tensor(batch, tokens, channels)


def text_states(
    batch: int, channels: int = 16, seed: int = 1, tokens: int = TEXT_TOKENS
) -> torch.Tensor:
    return random_tensor(batch, tokens, channels, seed=seed)


def pooled_text(batch: int, channels: int = 16, seed: int = 2) -> torch.Tensor:
    return random_tensor(batch, channels, seed=seed)


def prompted_inputs(
    latent: torch.Tensor, time: float = 500.0, text: int = TEXT_TOKENS, **inputs: Any
) -> Inputs:
    """A call with a latent, a timestep and the embedding of a prompt."""
    batch = len(latent)
    return call_inputs(
        hidden_states=latent,
        encoder_hidden_states=text_states(batch, tokens=text),
        timestep=at_time(batch, time),
        **inputs,
    )


def flux_inputs(batch: int, axes: int = 3, time: float = 0.5, **inputs: Any) -> Inputs:
    """A call of the Flux family: packed image tokens and explicit position ids."""
    image = torch.nn.functional.pad(grid_positions(4, 4), (1, axes - 3)).float()
    return prompted_inputs(
        token_latent(batch), time, img_ids=image, txt_ids=torch.zeros(TEXT_TOKENS, axes), **inputs
    )


def wan_inputs(batch: int, frames: int = 2, channels: int = 4, **inputs: Any) -> Inputs:
    """A call of the Wan family: a latent video and the embedding of a prompt."""
    return prompted_inputs(video_latent(batch, channels, frames), **inputs)


def config_of(*base: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    """The arguments of a constructor: those of the base, if any, with changes."""
    return {**(base[0] if base else {}), **arguments}


WIDE = config_of(num_attention_heads=2, attention_head_dim=16, num_layers=4, in_channels=4)

NARROW = config_of(num_attention_heads=4, attention_head_dim=8, num_layers=4, in_channels=4)

FLUX = config_of(
    in_channels=4,
    num_layers=3,
    num_single_layers=4,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=16,
    axes_dims_rope=(4, 6, 6),
)

WAN = config_of(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=16,
    ffn_dim=32,
    num_layers=4,
    rope_max_seq_len=32,
)

PIXART = config_of(
    num_attention_heads=4,
    attention_head_dim=8,
    in_channels=4,
    out_channels=8,
    num_layers=4,
    cross_attention_dim=32,
    attention_bias=True,
    sample_size=8,
    patch_size=2,
    activation_fn="gelu-approximate",
    num_embeds_ada_norm=1000,
    norm_type="ada_norm_single",
    norm_elementwise_affine=False,
    norm_eps=1e-6,
    caption_channels=16,
)

COGVIDEOX = config_of(
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    time_embed_dim=16,
    text_embed_dim=16,
    num_layers=4,
    sample_width=8,
    sample_height=8,
    sample_frames=5,
    max_text_seq_length=TEXT_TOKENS,
)

HUNYUAN = config_of(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=3,
    num_single_layers=4,
    num_refiner_layers=2,
    mlp_ratio=2.0,
    text_embed_dim=16,
)

LTX2 = config_of(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=16,
    cross_attention_dim=32,
    audio_in_channels=4,
    audio_out_channels=4,
    audio_num_attention_heads=2,
    audio_attention_head_dim=8,
    audio_cross_attention_dim=16,
    num_layers=4,
    caption_channels=16,
)
