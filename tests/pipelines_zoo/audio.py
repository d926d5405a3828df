"""Pipelines that make sound."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from ..zoo.parts import IMAGE_TOKENS, TEXT_TOKENS, random_tensor, text_mask
from .parts import WIDTH, PipelineEntry, Request, embed, flow, pipeline, random_model, transformer

__all__ = ["AUDIO"]


def oobleck() -> Any:
    """Two samples a latent."""
    return diffusers.AutoencoderOobleck(
        encoder_hidden_size=4,
        downsampling_ratios=[1, 2],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=4,
        sampling_rate=4,
    ).eval()


def say_prompts(pipe: Any) -> None:
    """In place of the text encoder of LongCat, whose pipeline takes no embeddings."""

    def encode_prompt(prompt: list[str], device: Any) -> tuple[Tensor, Tensor]:
        return embed(prompt), torch.full((len(prompt),), TEXT_TOKENS - 1)

    pipe.encode_prompt = encode_prompt


def stable_audio_3() -> dict[str, Any]:
    vae = diffusers.AutoencoderSAME(
        patch_size=2,
        encoder_channels=8,
        encoder_c_mults=(1,),
        encoder_strides=(2,),
        encoder_transformer_depths=(1,),
        latent_dim=4,
        dim_heads=4,
        sampling_rate=8,
    )
    return {
        "transformer": transformer("StableAudio3DiTModel"),
        "vae": vae.eval().requires_grad_(False),
        "duration_embedder": diffusers.StableAudio3DurationEmbedder(WIDTH, WIDTH).eval(),
        "scheduler": flow(shift=1.0),
    }


def timed(r: Request) -> dict[str, Any]:
    return {"encoder_attention_mask": r.mask(), "duration": 8.0 * (1 + r.size)}


def heard(r: Request) -> Tensor:
    """Sound to begin with, [batch, 2, samples]."""
    return random_tensor(r.batch, 2, 64 * (1 + r.size), seed=1000 + r.prompt)


def say_songs(pipe: Any) -> None:
    """In place of the text encoder of ACE-Step: prompts, and lyrics that are like them."""

    def encode_prompt(prompt: list[str], **_: Any) -> tuple[Tensor, ...]:
        mask = text_mask(len(prompt))
        return embed(prompt), mask, embed(prompt), mask

    pipe.encode_prompt = encode_prompt


AUDIO: list[PipelineEntry] = [
    pipeline(
        # It draws as many latents as the transformer has, whatever the length of the sound.
        "StableAudioPipeline",
        lambda: {
            "transformer": transformer("StableAudioDiTModel", global_states_input_dim=2 * WIDTH),
            "vae": oobleck(),
            "projection_model": random_model(
                "StableAudioProjectionModel",
                text_encoder_dim=WIDTH,
                conditioning_dim=WIDTH,
                min_value=0,
                max_value=32,
            ),
            "scheduler": diffusers.EDMDPMSolverMultistepScheduler(
                solver_order=2, prediction_type="v_prediction", sigma_data=1.0
            ),
        },
        lambda r: {
            "latents": random_tensor(r.batch, 4, IMAGE_TOKENS * (1 + r.size), seed=r.seed),
            "attention_mask": r.mask(),
            "negative_attention_mask": r.mask(),
        },
    ),
    pipeline(
        "StableAudio3Pipeline",
        stable_audio_3,
        lambda r: timed(r) | {"negative_encoder_attention_mask": r.mask()},
    ),
    pipeline(
        "StableAudio3AudioToAudioPipeline",
        stable_audio_3,
        lambda r: timed(r) | {"audio": heard(r), "init_noise_level": 0.8},
    ),
    pipeline(
        "StableAudio3InpaintPipeline",
        stable_audio_3,
        lambda r: {
            **timed(r),
            "audio": heard(r),
            "mask_start_seconds": 2.0,
            "mask_end_seconds": 6.0,
        },
    ),
    pipeline(
        "AceStepPipeline",
        lambda: {
            "transformer": transformer("AceStepTransformer1DModel"),
            "vae": oobleck(),
            "condition_encoder": random_model(
                "AceStepConditionEncoder",
                hidden_size=32,
                intermediate_size=64,
                text_hidden_dim=WIDTH,
                timbre_hidden_dim=4,
                num_lyric_encoder_hidden_layers=1,
                num_timbre_encoder_hidden_layers=1,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                sliding_window=2,
            ),
            "scheduler": flow(shift=1.0),
        },
        lambda r: {"prompt": r.words, "audio_duration": 8.0 * (1 + r.size)},
        adjust=say_songs,
    ),
    pipeline(
        "LongCatAudioDiTPipeline",
        lambda: {
            "transformer": transformer("LongCatAudioDiTTransformer"),
            "vae": diffusers.LongCatAudioDiTVae(
                channels=4,
                c_mults=[1, 1],
                strides=[2],
                latent_dim=4,
                encoder_latent_dim=8,
                downsampling_ratio=2,
                sample_rate=8,
            ).eval(),
            "scheduler": flow(shift=1.0, invert_sigmas=True),
        },
        lambda r: {"prompt": r.words, "audio_duration_s": 4.0 * (1 + r.size)},
        adjust=say_prompts,
    ),
]
