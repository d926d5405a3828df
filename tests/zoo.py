"""Tiny configurations of diffusers' transformer classes, for tests that compile each of them.

Every entry is the real class with a few narrow blocks and a handful of tokens, so that building it
and running it once takes a fraction of a second on one CPU core. All entries are captured as one
graph by `torch.compile(fullgraph=True)`; classes that are not are named in `NOT_CAPTURED`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Inputs = dict[str, Any]

_TEXT = 6  # tokens of a prompt
_IMAGE = 16  # tokens of an image: 8x8 latents in patches of 2x2


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


def _randn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal noise that depends on the shape and the seed only."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _time(batch: int, value: float = 500.0) -> torch.Tensor:
    """The same timestep for every sample, shape [batch]."""
    return torch.full((batch,), value)


def _mask(batch: int, tokens: int = _TEXT) -> torch.Tensor:
    """A boolean mask that hides the last token, as padding of a prompt would be."""
    return (torch.arange(tokens) < tokens - 1).repeat(batch, 1)


def _grid(*sizes: int) -> torch.Tensor:
    """The integer coordinates of a grid, shape [tokens, len(sizes)]."""
    return torch.cartesian_prod(*(torch.arange(size) for size in sizes))


def _angles(tokens: int, dim: int) -> torch.Tensor:
    """Rotary angles of shape [tokens, dim]."""
    frequencies = 100.0 ** -torch.linspace(0, 1, dim)
    return torch.arange(tokens)[:, None] * frequencies


def _rotary(tokens: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The (cos, sin) pair of interleaved rotary embeddings, each [tokens, dim]."""
    angles = _angles(tokens, dim // 2).repeat_interleave(2, dim=-1)
    return angles.cos(), angles.sin()


def _allegro_rotary() -> tuple[Any, Any]:
    """Tables of (cos, sin) for each axis of a 2x4x4 grid of tokens, and the positions in them."""
    angles = _angles(4, 2).repeat(1, 2)
    return ((angles.cos(), angles.sin()),) * 3, _grid(2, 4, 4).T[:, None]


def _far_mask() -> Any:
    """The block mask of AnyFlow-FAR for its two chunks of one frame each."""
    model: Any = ENTRIES["AnyFlowFARTransformer3DModel"].build()
    return model.build_attention_mask(chunk_partition=[1, 1], height=8, width=8)


def _cameras(batch: int) -> torch.Tensor:
    """Two frames of a pinhole camera at the origin: a 4x4 pose and (fx, fy, cx, cy)."""
    pose = torch.eye(4).flatten()
    return torch.cat([pose, torch.tensor([4.0, 4.0, 2.0, 2.0])]).repeat(batch, 2, 1)


def _call(**inputs: Any) -> Inputs:
    """The inputs of a call that returns a tuple."""
    return {**inputs, "return_dict": False}


def _image(batch: int) -> torch.Tensor:
    return _randn(batch, 4, 8, 8)


def _video(batch: int, channels: int = 4, frames: int = 2) -> torch.Tensor:
    return _randn(batch, channels, frames, 8, 8)


def _tokens(batch: int, tokens: int = _IMAGE, channels: int = 4) -> torch.Tensor:
    return _randn(batch, tokens, channels)


def _text(batch: int, channels: int = 16, seed: int = 1, tokens: int = _TEXT) -> torch.Tensor:
    return _randn(batch, tokens, channels, seed=seed)


def _pooled(batch: int, channels: int = 16, seed: int = 2) -> torch.Tensor:
    return _randn(batch, channels, seed=seed)


def _prompted(
    latent: torch.Tensor, time: float = 500.0, text: int = _TEXT, **inputs: Any
) -> Inputs:
    """A call with a latent, a timestep and the embedding of a prompt."""
    batch = len(latent)
    return _call(
        hidden_states=latent,
        encoder_hidden_states=_text(batch, tokens=text),
        timestep=_time(batch, time),
        **inputs,
    )


def _flux(batch: int, axes: int = 3, time: float = 0.5, **inputs: Any) -> Inputs:
    """A call of the Flux family: packed image tokens and explicit position ids."""
    image = torch.nn.functional.pad(_grid(4, 4), (1, axes - 3)).float()
    return _prompted(
        _tokens(batch), time, img_ids=image, txt_ids=torch.zeros(_TEXT, axes), **inputs
    )


def _wan(batch: int, frames: int = 2, channels: int = 4, **inputs: Any) -> Inputs:
    """A call of the Wan family: a latent video and the embedding of a prompt."""
    return _prompted(_video(batch, channels, frames), **inputs)


def _config(*base: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    """The arguments of a constructor: those of the base, if any, with changes."""
    return {**(base[0] if base else {}), **arguments}


_WIDE = _config(num_attention_heads=2, attention_head_dim=16, num_layers=4, in_channels=4)

_NARROW = _config(num_attention_heads=4, attention_head_dim=8, num_layers=4, in_channels=4)

_FLUX = _config(
    in_channels=4,
    num_layers=3,
    num_single_layers=4,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=16,
    axes_dims_rope=(4, 6, 6),
)

_WAN = _config(
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

_PIXART = _config(
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

_COGVIDEOX = _config(
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
    max_text_seq_length=_TEXT,
)

_HUNYUAN = _config(
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

_LTX2 = _config(
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

_ENTRIES = [
    Entry(
        "AceStepTransformer1DModel",
        _config(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            in_channels=12,
            audio_acoustic_hidden_dim=4,
            sliding_window=2,
        ),
        lambda b: _call(
            hidden_states=_tokens(b),
            context_latents=_randn(b, _IMAGE, 8, seed=2),
            encoder_hidden_states=_text(b, 32),
            timestep=_time(b, 0.5),
            timestep_r=_time(b, 0.25),
        ),
    ),
    Entry(
        "AllegroTransformer3DModel",
        _config(
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=4,
            cross_attention_dim=24,
            sample_height=8,
            sample_width=8,
            sample_frames=2,
            caption_channels=16,
        ),
        lambda b: _prompted(
            _video(b), encoder_attention_mask=_mask(b), image_rotary_emb=_allegro_rotary()
        ),
    ),
    Entry(
        "AnyFlowTransformer3DModel",
        _WAN,
        # The timestep has one value per frame; the frames come before the channels.
        lambda b: _call(
            hidden_states=_randn(b, 2, 4, 8, 8),
            encoder_hidden_states=_text(b),
            timestep=torch.full((b, 2), 500.0),
            r_timestep=torch.full((b, 2), 250.0),
        ),
    ),
    Entry(
        # Two chunks of one frame: the first one compressed, the second one in full. The block mask
        # is built outside of the graph, as diffusers asks for.
        "AnyFlowFARTransformer3DModel",
        _config(_WAN, chunk_partition=(1, 1), full_chunk_limit=1),
        lambda b: _call(
            hidden_states=_randn(b, 2, 4, 8, 8),
            encoder_hidden_states=_text(b),
            timestep=torch.full((b, 2), 500.0),
            r_timestep=torch.full((b, 2), 250.0),
            chunk_partition=[1, 1],
            attention_mask=_far_mask(),
        ),
    ),
    Entry(
        "AuraFlowTransformer2DModel",
        _config(
            sample_size=8,
            num_mmdit_layers=3,
            num_single_dit_layers=4,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=16,
            caption_projection_dim=32,
            pos_embed_max_size=16,
        ),
        lambda b: _prompted(_image(b), time=0.5),
    ),
    Entry("BriaTransformer2DModel", _FLUX, lambda b: _flux(b, time=500.0)),
    Entry(
        "BriaFiboTransformer2DModel",
        _config(_FLUX, text_encoder_dim=16),
        lambda b: _flux(
            b, time=500.0, text_encoder_layers=[_text(b, seed=10 + layer) for layer in range(7)]
        ),
    ),
    Entry(
        "BriaFibo2Transformer2DModel",
        _config(
            in_channels=4,
            dim=32,
            n_layers=4,
            n_heads=2,
            cap_feat_dim=16,
            injection_layer_ids=(1, 3),
            min_num_gist_tokens=2,
            max_num_gist_tokens=4,
            gist_step=1,
            gist_min_text_len=2,
            gist_max_text_len=8,
            axes_dims=(4, 6, 6),
            axes_lens=(16, 16, 16),
        ),
        # No mask of the prompt: the number of gist tokens is read from its values.
        lambda b: _call(
            hidden_states=_image(b),
            encoder_hidden_states=_randn(b, 3, _TEXT, 16, seed=1),
            timestep=_time(b, 0.5),
        ),
    ),
    Entry(
        "ChromaTransformer2DModel",
        _config(
            _FLUX, approximator_num_channels=16, approximator_hidden_dim=32, approximator_layers=2
        ),
        lambda b: _flux(b, attention_mask=_mask(b, _TEXT + _IMAGE)),
    ),
    Entry(
        "ChronoEditTransformer3DModel",
        _config(_WAN, image_dim=16, added_kv_proj_dim=24, rope_temporal_skip_len=2),
        # The cross-attention takes the last 512 tokens as the prompt, the rest as the image.
        lambda b: _wan(b, text=512, encoder_hidden_states_image=_text(b, seed=2)),
    ),
    Entry(
        "CogVideoXTransformer3DModel",
        _config(_COGVIDEOX, use_rotary_positional_embeddings=True),
        lambda b: _prompted(_randn(b, 2, 4, 8, 8), image_rotary_emb=_rotary(2 * _IMAGE, 16)),
    ),
    Entry(
        "CogView3PlusTransformer2DModel",
        _config(
            _NARROW,
            out_channels=4,
            text_embed_dim=16,
            time_embed_dim=16,
            condition_dim=4,
            pos_embed_max_size=8,
            sample_size=8,
        ),
        lambda b: _prompted(
            _image(b),
            original_size=torch.full((b, 2), 64.0),
            target_size=torch.full((b, 2), 64.0),
            crop_coords=torch.zeros(b, 2),
        ),
    ),
    Entry(
        "CogView4Transformer2DModel",
        _config(
            _NARROW,
            out_channels=4,
            text_embed_dim=16,
            time_embed_dim=16,
            condition_dim=4,
            pos_embed_max_size=8,
            sample_size=8,
            rope_axes_dim=(8, 8),
        ),
        lambda b: _prompted(
            _image(b),
            original_size=torch.full((b, 2), 64.0),
            target_size=torch.full((b, 2), 64.0),
            crop_coords=torch.zeros(b, 2),
        ),
    ),
    Entry(
        "ConsisIDTransformer3DModel",
        _config(
            _COGVIDEOX,
            attention_head_dim=24,
            is_train_face=True,
            cross_attn_dim_head=8,
            cross_attn_num_heads=2,
            LFE_id_dim=4,
            LFE_vit_dim=4,
            LFE_depth=5,
            LFE_dim_head=4,
            LFE_num_heads=2,
            LFE_num_id_token=2,
            LFE_num_querie=2,
            LFE_output_dim=32,
            LFE_ff_mult=2,
        ),
        lambda b: _prompted(
            _randn(b, 2, 4, 8, 8),
            id_cond=_randn(b, 4, seed=2),
            id_vit_hidden=[_randn(b, 3, 4, seed=10 + scale) for scale in range(5)],
        ),
    ),
    Entry(
        "CosmosTransformer3DModel",
        _config(
            _WIDE,
            out_channels=4,
            mlp_ratio=2.0,
            text_embed_dim=16,
            adaln_lora_dim=4,
            max_size=(4, 8, 8),
            concat_padding_mask=False,  # it needs torchvision
        ),
        lambda b: _prompted(_video(b), time=0.5),
    ),
    Entry(
        # The samples are packed into one sequence: the prompt, then one video per sample. The
        # latent is a list with one tensor per sample, and each token of a video has its timestep.
        "Cosmos3OmniTransformer",
        _config(
            head_dim=16,
            hidden_size=32,
            intermediate_size=64,
            latent_channel=4,
            num_attention_heads=2,
            num_hidden_layers=4,
            num_key_value_heads=1,
            patch_latent_dim=16,
            rope_axes_dim=(4, 2, 2),
            vocab_size=32,
        ),
        lambda b: _call(
            input_ids=torch.arange(_TEXT),
            text_indexes=torch.arange(_TEXT),
            position_ids=torch.cat([torch.zeros(_TEXT, 3), _grid(b, 4, 4)]).T,
            und_len=_TEXT,
            sequence_length=_TEXT + _IMAGE * b,
            vision_tokens=list(_randn(b, 1, 4, 1, 8, 8)),
            vision_token_shapes=[(1, 4, 4)] * b,
            vision_sequence_indexes=torch.arange(_IMAGE * b) + _TEXT,
            vision_mse_loss_indexes=torch.arange(_IMAGE * b) + _TEXT,
            vision_timesteps=_time(_IMAGE * b),
            vision_noisy_frame_indexes=[torch.tensor([0])] * b,
        ),
        timestep="vision_timesteps",
        latent="vision_tokens",
    ),
    Entry(
        "DiTTransformer2DModel",
        _config(
            num_attention_heads=4,
            attention_head_dim=8,
            out_channels=8,
            num_layers=4,
            sample_size=8,
            num_embeds_ada_norm=10,
        ),
        lambda b: _call(
            hidden_states=_image(b), timestep=_time(b), class_labels=torch.arange(b) % 10
        ),
    ),
    Entry(
        "DreamLiteTransformer2DModel",
        _config(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=32,
            num_layers=4,
            norm_num_groups=8,
            cross_attention_dim=16,
        ),
        lambda b: _prompted(_randn(b, 32, 4, 4)),
    ),
    Entry(
        # The lengths of the two prompts, 77 and 257 tokens, are fixed.
        "DualTransformer2DModel",
        _config(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=32,
            num_layers=4,
            norm_num_groups=8,
            cross_attention_dim=16,
        ),
        lambda b: _call(
            hidden_states=_randn(b, 32, 4, 4),
            encoder_hidden_states=_randn(b, 77 + 257, 16, seed=1),
            timestep=_time(b),
        ),
    ),
    Entry(
        "EasyAnimateTransformer3DModel",
        _config(
            _WIDE,
            out_channels=4,
            patch_size=2,
            sample_width=8,
            sample_height=8,
            mmdit_layers=3,
            time_embed_dim=16,
            text_embed_dim=16,
        ),
        lambda b: _prompted(_video(b)),
    ),
    Entry(
        "ErnieImageTransformer2DModel",
        _config(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=4,
            ffn_hidden_size=64,
            in_channels=4,
            out_channels=4,
            patch_size=2,
            text_in_dim=16,
            rope_axes_dim=(4, 6, 6),
        ),
        lambda b: _call(
            hidden_states=_image(b),
            text_bth=_text(b),
            text_lens=torch.full((b,), _TEXT - 1),
            timestep=_time(b),
        ),
    ),
    Entry(
        "FluxTransformer2DModel",
        _config(_FLUX, pooled_projection_dim=16, guidance_embeds=True),
        lambda b: _flux(b, pooled_projections=_pooled(b), guidance=_time(b, 3.5)),
    ),
    Entry(
        "Flux2Transformer2DModel",
        _config(_FLUX, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4)),
        lambda b: _flux(b, axes=4, guidance=_time(b, 3.5)),
    ),
    Entry(
        "Flux3Transformer2DModel",
        _config(_FLUX, cond_in_channels=4, timestep_channels=16, axes_dims_rope=(4, 4, 4, 4)),
        lambda b: _flux(
            b,
            axes=4,
            image_cond_hidden_states=_randn(b, 4, 4, seed=3),
            image_cond_ids=torch.nn.functional.pad(_grid(2, 2), (1, 1), value=1).float(),
        ),
    ),
    Entry(
        "GlmImageTransformer2DModel",
        _config(
            _NARROW,
            out_channels=4,
            text_embed_dim=16,
            time_embed_dim=16,
            condition_dim=4,
            prior_vq_quantizer_codebook_size=32,
        ),
        lambda b: _prompted(
            _image(b),
            prior_token_id=torch.arange(_IMAGE).repeat(b, 1),
            prior_token_drop=torch.zeros(b, _IMAGE, dtype=torch.bool),
            target_size=torch.full((b, 2), 64.0),
            crop_coords=torch.zeros(b, 2),
        ),
    ),
    Entry(
        "HeliosTransformer3DModel",
        _config(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=32,
            num_layers=4,
            rope_dim=(4, 4, 4),
        ),
        lambda b: _wan(
            b,
            indices_hidden_states=torch.arange(7, 9).repeat(b, 1),
            indices_latents_history_short=torch.arange(6, 7).repeat(b, 1),
            indices_latents_history_mid=torch.arange(4, 6).repeat(b, 1),
            indices_latents_history_long=torch.arange(0, 4).repeat(b, 1),
            latents_history_short=_randn(b, 4, 1, 8, 8, seed=2),
            latents_history_mid=_randn(b, 4, 2, 8, 8, seed=3),
            latents_history_long=_randn(b, 4, 4, 8, 8, seed=4),
        ),
    ),
    Entry(
        "HiDreamImageTransformer2DModel",
        _config(
            patch_size=2,
            in_channels=4,
            num_layers=3,
            num_single_layers=4,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_channels=[16, 16],
            text_emb_dim=16,
            num_routed_experts=0,  # dense: the routing reads the count of tokens of each expert
            axes_dims_rope=(4, 6, 6),
            max_resolution=(8, 8),
            llama_layers=[0, 1, 0, 1, 0, 1, 0],
        ),
        lambda b: _call(
            hidden_states=_image(b),
            timesteps=_time(b),
            encoder_hidden_states_t5=_text(b),
            encoder_hidden_states_llama3=_randn(2, b, _TEXT, 16, seed=3),
            pooled_embeds=_pooled(b),
        ),
        timestep="timesteps",
    ),
    Entry(
        "HunyuanDiT2DModel",
        _config(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            patch_size=2,
            sample_size=8,
            hidden_size=32,
            num_layers=6,
            mlp_ratio=2.0,
            cross_attention_dim=16,
            cross_attention_dim_t5=16,
            pooled_projection_dim=4,
            text_len=_TEXT,
            text_len_t5=_TEXT,
        ),
        lambda b: _prompted(
            _image(b),
            text_embedding_mask=_mask(b),
            encoder_hidden_states_t5=_text(b, seed=2),
            text_embedding_mask_t5=_mask(b),
            image_meta_size=torch.tensor([64.0, 64.0, 64.0, 64.0, 0.0, 0.0]).repeat(b, 1),
            style=torch.zeros(b, dtype=torch.long),
            image_rotary_emb=_rotary(_IMAGE, 8),
        ),
    ),
    Entry(
        # With one prompt: how a second one is merged depends on the values of the masks.
        "HunyuanImageTransformer2DModel",
        _config(_HUNYUAN, patch_size=(2, 2), rope_axes_dim=(8, 8)),
        lambda b: _prompted(_image(b), encoder_attention_mask=_mask(b)),
    ),
    Entry(
        "HunyuanVideoTransformer3DModel",
        _config(_HUNYUAN, pooled_projection_dim=16, rope_axes_dim=(4, 6, 6)),
        lambda b: _prompted(
            _video(b),
            encoder_attention_mask=_mask(b),
            pooled_projections=_pooled(b),
            guidance=_time(b, 6000.0),
        ),
    ),
    Entry(
        "HunyuanVideoFramepackTransformer3DModel",
        _config(
            _HUNYUAN,
            pooled_projection_dim=16,
            rope_axes_dim=(4, 6, 6),
            has_image_proj=True,
            image_proj_dim=16,
            has_clean_x_embedder=True,
        ),
        lambda b: _prompted(
            _video(b),
            encoder_attention_mask=_mask(b),
            pooled_projections=_pooled(b),
            image_embeds=_text(b, seed=3),
            indices_latents=torch.arange(7, 9),
            guidance=_time(b, 6000.0),
            latents_clean=_randn(b, 4, 2, 8, 8, seed=4),
            indices_latents_clean=torch.arange(0, 2),
            latents_history_2x=_randn(b, 4, 2, 8, 8, seed=5),
            indices_latents_history_2x=torch.arange(5, 7),
            latents_history_4x=_randn(b, 4, 4, 8, 8, seed=6),
            indices_latents_history_4x=torch.arange(1, 5),
        ),
    ),
    Entry(
        "Ideogram4Transformer2DModel",
        _config(
            _WIDE, intermediate_size=64, adaln_dim=8, llm_features_dim=16, mrope_section=(4, 2, 2)
        ),
        # One sequence: the prompt (role 3), then the image (role 2).
        lambda b: _call(
            hidden_states=_tokens(b, _TEXT + _IMAGE),
            encoder_hidden_states=_randn(b, _TEXT + _IMAGE, 16, seed=1),
            timestep=_time(b, 0.5),
            position_ids=torch.cat([torch.arange(_TEXT)[:, None].expand(-1, 3), _grid(1, 4, 4)])
            .float()
            .repeat(b, 1, 1),
            segment_ids=torch.zeros(b, _TEXT + _IMAGE, dtype=torch.long),
            indicator=torch.tensor([3] * _TEXT + [2] * _IMAGE).repeat(b, 1),
        ),
    ),
    Entry(
        "JoyImageEditTransformer3DModel",
        _config(
            patch_size=[1, 2, 2],
            in_channels=4,
            hidden_size=32,
            num_attention_heads=2,
            text_dim=16,
            mlp_width_ratio=2.0,
            num_layers=4,
            rope_dim_list=[4, 6, 6],
        ),
        lambda b: _prompted(_video(b, frames=1)),
    ),
    Entry(
        "JoyImageEditPlusTransformer3DModel",
        _config(
            patch_size=[1, 2, 2],
            in_channels=4,
            hidden_size=32,
            num_attention_heads=2,
            text_dim=16,
            mlp_width_ratio=2.0,
            num_layers=4,
            rope_dim_list=[4, 6, 6],
        ),
        # The latent arrives as patches: the noisy image, then one reference image.
        lambda b: _prompted(
            _randn(b, 2 * _IMAGE, 4, 1, 2, 2),
            encoder_hidden_states_mask=_mask(b).float(),
            shape_list=[[(1, 4, 4), (1, 4, 4)]] * b,
        ),
    ),
    Entry(
        "Kandinsky5Transformer3DModel",
        _config(
            in_text_dim=16,
            in_text_dim2=16,
            time_dim=16,
            model_dim=32,
            ff_dim=64,
            num_text_blocks=2,
            num_visual_blocks=4,
            axes_dims=(4, 6, 6),
        ),
        lambda b: _prompted(
            _randn(b, 2, 8, 8, 4),
            pooled_projections=_pooled(b),
            visual_rope_pos=(torch.arange(2), torch.arange(4), torch.arange(4)),
            text_rope_pos=torch.arange(_TEXT),
        ),
    ),
    Entry(
        "Kandinsky6Transformer3DModel",
        _config(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=16,
            in_text_dim2=16,
            time_dim=16,
            model_dim=32,
            ff_dim=64,
            num_text_blocks=2,
            num_visual_blocks=4,
            axes_dims=(4, 6, 6),
            visual_cond=False,
            in_audio_dim=4,
            out_audio_dim=4,
        ),
        lambda b: _prompted(
            _randn(b, 2, 8, 8, 4),
            audio_hidden_states=_randn(b, 5, 4, seed=3),
            pooled_projections=_pooled(b),
        ),
    ),
    Entry(
        # Its sparse attention is flex attention, which has no backward pass on CPU.
        "Kandinsky6SRTransformer3DModel",
        _config(
            in_visual_dim=4,
            out_visual_dim=4,
            time_dim=16,
            model_dim=32,
            ff_dim=64,
            num_visual_blocks=4,
            axes_dims=(4, 6, 6),
        ),
        # The latent comes with a conditioning video and its mask: 2 * 4 + 1 channels.
        lambda b: _call(hidden_states=_randn(b, 2, 8, 8, 9), timestep=_time(b)),
    ),
    Entry(
        "Krea2Transformer2DModel",
        _config(
            _WIDE,
            num_key_value_heads=1,
            intermediate_size=64,
            timestep_embed_dim=16,
            text_hidden_dim=16,
            num_text_layers=3,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=32,
            axes_dims_rope=(4, 6, 6),
        ),
        lambda b: _call(
            hidden_states=_tokens(b),
            encoder_hidden_states=_randn(b, _TEXT, 3, 16, seed=1),
            encoder_attention_mask=_mask(b),
            timestep=_time(b, 0.5),
            position_ids=torch.cat([torch.zeros(_TEXT, 3), _grid(1, 4, 4)]),
        ),
    ),
    Entry(
        "LatteTransformer3DModel", _config(_PIXART, video_length=2), lambda b: _prompted(_video(b))
    ),
    Entry(
        "LongCatAudioDiTTransformer",
        _config(dit_dim=32, dit_depth=4, dit_heads=4, dit_text_dim=16, latent_dim=4, ff_mult=2.0),
        lambda b: _prompted(
            _tokens(b),
            time=0.5,
            encoder_attention_mask=_mask(b),
            attention_mask=_mask(b, _IMAGE),
            latent_cond=_randn(b, _IMAGE, 4, seed=2),
        ),
    ),
    Entry("LongCatImageTransformer2DModel", _config(_FLUX, pooled_projection_dim=16), _flux),
    Entry(
        "LTX2VideoTransformer3DModel",
        _LTX2,
        lambda b: _prompted(
            _tokens(b, 2 * _IMAGE),
            audio_hidden_states=_randn(b, 5, 4, seed=3),
            audio_encoder_hidden_states=_text(b, seed=2),
            encoder_attention_mask=_mask(b),
            audio_encoder_attention_mask=_mask(b),
            num_frames=2,
            height=4,
            width=4,
            audio_num_frames=5,
        ),
    ),
    Entry(
        "LTXVideoTransformer3DModel",
        _config(_WIDE, out_channels=4, cross_attention_dim=32, caption_channels=16),
        lambda b: _prompted(
            _tokens(b, 2 * _IMAGE), encoder_attention_mask=_mask(b), num_frames=2, height=4, width=4
        ),
    ),
    Entry(
        "LuminaNextDiT2DModel",
        _config(
            sample_size=8,
            hidden_size=32,
            num_layers=4,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=16,
            cross_attention_dim=16,
        ),
        lambda b: _prompted(
            _image(b),
            time=0.5,
            encoder_mask=_mask(b),
            image_rotary_emb=torch.polar(torch.ones(_IMAGE, 4), _angles(_IMAGE, 4)).view(4, 4, 4),
            cross_attention_kwargs={},
        ),
    ),
    Entry(
        # The timestep has one value per noise level, whatever the batch: the video and the audio
        # are at the first level, the prompt at the second.
        "MiniMaxH3Transformer3DModel",
        _config(
            _WIDE,
            hidden_size=32,
            ffn_dim=64,
            audio_in_channels=4,
            text_dim=16,
            freq_dim=16,
            time_embed_hidden_dim=16,
            time_embed_dim=16,
            rope_freq_dim=2,
        ),
        lambda b: _call(
            hidden_states=_tokens(b, channels=16),
            audio_hidden_states=_randn(b, 4, 4, seed=3),
            encoder_hidden_states=_text(b),
            timestep=torch.tensor([500.0, 0.0]),
            timestep_indices=torch.tensor([1] * _TEXT + [0] * (_IMAGE + 4)),
            token_tags=torch.tensor([0] * _TEXT + [1] * _IMAGE + [2] * 4),
            position_ids=torch.cat([torch.zeros(_TEXT, 3), _grid(1, 4, 4), _grid(4, 1, 1)]),
            text_indices=torch.arange(_TEXT),
            video_indices=torch.arange(_TEXT, _TEXT + _IMAGE),
            audio_indices=torch.arange(_TEXT + _IMAGE, _TEXT + _IMAGE + 4),
        ),
    ),
    Entry(
        "MiniMaxMusic3Transformer1DModel",
        _config(_WIDE, condition_dim=16, ff_inner_dim=64, rotary_dim=8, fourier_embedding_dim=16),
        lambda b: _call(
            hidden_states=_randn(b, 4, _IMAGE),
            encoder_hidden_states=_randn(b, _IMAGE, 16, seed=1),
            timestep=_time(b, 0.5),
        ),
    ),
    Entry(
        "MochiTransformer3DModel",
        _config(
            _WIDE,
            pooled_projection_dim=16,
            text_embed_dim=16,
            time_embed_dim=8,
            max_sequence_length=_TEXT,
        ),
        lambda b: _prompted(_video(b), encoder_attention_mask=_mask(b)),
    ),
    Entry(
        "MotifVideoTransformer3DModel",
        _config(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=3,
            num_single_layers=6,
            num_decoder_layers=3,
            mlp_ratio=2.0,
            text_embed_dim=16,
            rope_axes_dim=(4, 6, 6),
            enable_text_cross_attention_dual=True,
            enable_text_cross_attention_single=True,
        ),
        lambda b: _prompted(_video(b), encoder_attention_mask=_mask(b)),
    ),
    Entry(
        "NucleusMoEImageTransformer2DModel",
        _config(
            in_channels=16,
            out_channels=4,
            num_layers=4,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
            mlp_ratio=6.0,
            dense_moe_strategy="leave_first_block_dense",
            num_experts=4,
            moe_intermediate_dim=16,
            capacity_factors=2.0,
        ),
        lambda b: _prompted(
            _tokens(b, channels=16),
            time=0.5,
            encoder_hidden_states_mask=_mask(b),
            img_shapes=[(1, 4, 4)] * b,
        ),
    ),
    Entry("OvisImageTransformer2DModel", _config(_FLUX, out_channels=4), _flux),
    Entry(
        "PixArtTransformer2DModel",
        _PIXART,
        lambda b: _prompted(
            _image(b),
            encoder_attention_mask=_mask(b),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ),
    ),
    Entry(
        "PriorTransformer",
        _config(
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=4,
            embedding_dim=16,
            num_embeddings=_TEXT,
        ),
        lambda b: _prompted(_randn(b, 16), proj_embedding=_pooled(b), attention_mask=_mask(b)),
    ),
    Entry(
        "PRXTransformer2DModel",
        _config(
            in_channels=4,
            context_in_dim=16,
            hidden_size=32,
            mlp_ratio=2.0,
            num_heads=2,
            depth=4,
            axes_dim=[8, 8],
        ),
        lambda b: _prompted(_image(b), time=0.5, attention_mask=_mask(b)),
    ),
    Entry(
        "QwenImageTransformer2DModel",
        _config(
            in_channels=16,
            out_channels=4,
            num_layers=4,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
        ),
        lambda b: _prompted(
            _tokens(b, channels=16),
            time=0.5,
            encoder_hidden_states_mask=_mask(b),
            img_shapes=[[(1, 4, 4)]] * b,
        ),
    ),
    Entry(
        # A protein: the noisy backbone and the noisy latents have timesteps of their own.
        "RFD4ProteinaTransformer",
        _config(
            nlayers=4,
            token_dim=32,
            nheads=4,
            dim_cond=16,
            pair_repr_dim=8,
            latent_dim=4,
            token_type_emb_dim=4,
            t_emb_dim=8,
            seq_sep_dim=8,
            xt_pair_dist_dim=8,
            tri_mult_c=8,
            num_sequence_classes=8,
            feats_seq=("xt_bb_ca", "xt_local_latents", "token_type"),
            feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents"),
            feats_pair_repr=("xt_bb_ca_pair_dists",),
        ),
        lambda b: _call(
            bb_ca=_randn(b, 8, 3),
            local_latents=_randn(b, 8, 4, seed=1),
            bb_ca_time=_time(b, 0.5),
            local_latents_time=_time(b, 0.5),
            padding_mask=_mask(b, 8),
            token_type=torch.zeros(b, 8, dtype=torch.long),
            conditioning={
                "is_in_context_conditioning": torch.zeros(b, 8, dtype=torch.bool),
                "supports_local_latent": torch.ones(b, 8, dtype=torch.bool),
            },
        ),
        timestep="bb_ca_time",
        latent="bb_ca",
    ),
    Entry(
        "SanaTransformer2DModel",
        _config(
            _NARROW,
            out_channels=4,
            num_cross_attention_heads=4,
            cross_attention_head_dim=8,
            cross_attention_dim=32,
            caption_channels=16,
            sample_size=8,
            patch_size=2,
        ),
        lambda b: _prompted(_image(b), encoder_attention_mask=_mask(b)),
    ),
    Entry(
        "SanaVideoTransformer3DModel",
        _config(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=16,
            sample_size=8,
            rope_max_seq_len=32,
        ),
        lambda b: _prompted(_video(b), encoder_attention_mask=_mask(b)),
    ),
    Entry(
        # The timestep has one value per frame.
        "SanaWMTransformer3DModel",
        _config(
            in_channels=4,
            num_layers=4,
            hidden_size=48,
            num_attention_heads=2,
            softmax_every_n=2,
            linear_head_dim=24,
            chunk_plucker_channels=4,
            chunk_plucker_post_attn_blocks=4,
            caption_channels=16,
            image_size=64,
        ),
        lambda b: _call(
            hidden_states=_randn(b, 4, 2, 4, 4),
            encoder_hidden_states=_randn(b, 1, _TEXT, 16, seed=1),
            encoder_attention_mask=_mask(b)[:, None, None],
            timestep=torch.full((b, 1, 2), 500.0),
            camera_conditions=_cameras(b),
            chunk_plucker=_randn(b, 4, 2, 4, 4, seed=2),
        ),
    ),
    Entry(
        "SanaWMLTX2RefinerTransformer3DModel",
        _LTX2,
        lambda b: _prompted(
            _tokens(b, 2 * _IMAGE),
            encoder_attention_mask=_mask(b),
            video_rotary_emb=_rotary(2 * _IMAGE, 32),
        ),
    ),
    Entry(
        "SD3Transformer2DModel",
        _config(
            _NARROW,
            sample_size=8,
            joint_attention_dim=16,
            caption_projection_dim=32,
            pooled_projection_dim=16,
            out_channels=4,
            pos_embed_max_size=8,
            dual_attention_layers=(0, 1),
            qk_norm="rms_norm",
        ),
        lambda b: _prompted(_image(b), pooled_projections=_pooled(b)),
    ),
    Entry("SkyReelsV2Transformer3DModel", _WAN, _wan),
    Entry(
        "StableAudioDiTModel",
        _config(
            _NARROW,
            sample_size=_IMAGE,
            num_key_value_attention_heads=2,
            out_channels=4,
            cross_attention_dim=16,
            time_proj_dim=8,
            global_states_input_dim=16,
            cross_attention_input_dim=16,
        ),
        # The rotary embedding covers half of a head; the global state is one more token.
        lambda b: _prompted(
            _randn(b, 4, _IMAGE),
            time=0.5,
            global_hidden_states=_randn(b, 1, 16, seed=2),
            rotary_embedding=_rotary(_IMAGE + 1, 4),
        ),
    ),
    Entry(
        "StableAudio3DiTModel",
        _config(
            io_channels=4,
            embed_dim=32,
            depth=4,
            num_heads=2,
            cond_token_dim=16,
            global_cond_dim=16,
            local_add_cond_dim=5,
            timestep_features_dim=16,
            ff_mult=2.0,
            num_memory_tokens=2,
        ),
        lambda b: _prompted(
            _randn(b, 4, _IMAGE),
            time=0.5,
            encoder_attention_mask=_mask(b),
            global_hidden_states=_pooled(b),
            local_add_cond=_randn(b, 5, _IMAGE, seed=3),
        ),
    ),
    Entry(
        "T5FilmDecoder",
        _config(
            input_dims=4, targets_length=8, d_model=32, num_layers=4, num_heads=4, d_kv=8, d_ff=64
        ),
        lambda b: {  # it has no return_dict: the output is a tensor
            "encodings_and_masks": [(_text(b, 32), torch.ones(b, _TEXT))],
            "decoder_input_tokens": _randn(b, 8, 4),
            "decoder_noise_time": _time(b, 0.5),
        },
        timestep="decoder_noise_time",
        latent="decoder_input_tokens",
    ),
    Entry(
        "Transformer2DModel",
        _PIXART,
        lambda b: _prompted(
            _image(b),
            encoder_attention_mask=_mask(b),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ),
    ),
    Entry(
        "TransformerTemporalModel",
        _config(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=32,
            num_layers=4,
            norm_num_groups=8,
        ),
        lambda b: _call(hidden_states=_randn(3 * b, 32, 2, 2), num_frames=3, timestep=_time(b)),
    ),
    Entry("WanTransformer3DModel", _WAN, _wan),
    Entry(
        "WanAnimateTransformer3DModel",
        _config(
            _WAN,
            in_channels=12,
            latent_channels=4,
            image_dim=16,
            added_kv_proj_dim=24,
            motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
            motion_encoder_size=16,
            motion_style_dim=8,
            motion_dim=4,
            motion_encoder_dim=8,
            face_encoder_hidden_dim=16,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=2,
        ),
        lambda b: _wan(
            b,
            frames=3,
            channels=12,
            text=512,
            encoder_hidden_states_image=_text(b, seed=2),
            pose_hidden_states=_randn(b, 4, 2, 8, 8, seed=3),
            face_pixel_values=_randn(b, 3, 8, 16, 16, seed=4),
        ),
    ),
    Entry(
        "WanVACETransformer3DModel",
        _config(_WAN, vace_layers=[0, 2], vace_in_channels=8),
        lambda b: _wan(b, control_hidden_states=_randn(b, 8, 2, 8, 8, seed=2)),
    ),
    Entry(
        # The latent is a list with one [channels, frames, height, width] tensor per sample.
        "ZImageTransformer2DModel",
        _config(
            in_channels=4,
            dim=32,
            n_layers=4,
            n_refiner_layers=2,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 6, 6],
            axes_lens=[64, 16, 16],
        ),
        lambda b: _call(x=list(_randn(b, 4, 1, 8, 8)), t=_time(b, 0.5), cap_feats=list(_text(b))),
        timestep="t",
        latent="x",
    ),
]

ENTRIES: dict[str, Entry] = {entry.class_name: entry for entry in _ENTRIES}

# They accept a timestep and do not use it in these configurations.
TIME_INDEPENDENT: frozenset[str] = frozenset(
    {"DreamLiteTransformer2DModel", "DualTransformer2DModel", "TransformerTemporalModel"}
)

NOT_CAPTURED: dict[str, str] = {
    "HunyuanVideo15Transformer3DModel": "branches on whether the image embeddings are all zeros",
    "Lumina2Transformer2DModel": "reads the lengths of the prompts from the mask",
    "OmniGenTransformer2DModel": "branches on the largest position id",
    "QwenImage21Transformer2DModel": "reads the layout of the tokens from a mask (tolist)",
    "WanAnimate2Transformer3DModel": "reads the size of the grid from a tensor (item, tolist)",
}
