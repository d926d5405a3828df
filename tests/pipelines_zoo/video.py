"""Pipelines that make videos, but for those that follow Wan."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor

from ..zoo.parts import TEXT_TOKENS, random_tensor, text_mask
from .parts import (
    WIDTH,
    PipelineEntry,
    Request,
    Silent,
    embed,
    flow,
    pipeline,
    random_model,
    shifting,
    transformer,
)

__all__ = ["VIDEO"]

PIXELS = 64


def sampled(kind: str, scheduler: Any, **config: Any) -> dict[str, Any]:
    """A transformer, as it's in the zoo but for a few settings, and a scheduler."""
    return {"transformer": transformer(kind, **config), "scheduler": scheduler}


def video_autoencoder(kind: str, block: str, **config: Any) -> Any:
    """An autoencoder of four levels, 8 pixels and 4 frames a latent."""
    return (
        getattr(diffusers, kind)(
            **{
                "down_block_types": (f"{block}DownBlock3D",) * 4,
                "up_block_types": (f"{block}UpBlock3D",) * 4,
                "block_out_channels": (8,) * 4,
                "latent_channels": 4,
                "layers_per_block": 1,
                "norm_num_groups": 2,
                **config,
            }
        )
        .eval()
        .requires_grad_(False)
    )


def cogvideox(scheduler: Any = None, **config: Any) -> dict[str, Any]:
    return {
        **sampled(
            "CogVideoXTransformer3DModel", scheduler or diffusers.CogVideoXDDIMScheduler(), **config
        ),
        "vae": video_autoencoder("AutoencoderKLCogVideoX", "CogVideoX"),
    }


def hunyuan(**config: Any) -> dict[str, Any]:
    return {
        **sampled("HunyuanVideoTransformer3DModel", flow(), **config),
        "vae": video_autoencoder("AutoencoderKLHunyuanVideo", "HunyuanVideo"),
    }


def hunyuan15(task: str) -> dict[str, Any]:
    model = random_model(
        "HunyuanVideo15Transformer3DModel",
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=WIDTH,
        text_embed_2_dim=WIDTH,
        image_embed_dim=WIDTH,
        rope_axes_dim=(4, 6, 6),
        target_size=PIXELS,
        task_type=task,
    )
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        spatial_compression_ratio=8,
    )
    return {
        "transformer": model,
        "vae": vae.eval().requires_grad_(False),
        "scheduler": flow(),
        "guider": diffusers.ClassifierFreeGuidance(),
    }


def easyanimate(**config: Any) -> dict[str, Any]:
    spatial, temporal = "Spatial{}Block3D", "SpatialTemporal{}Block3D"
    types = {
        f"{way.lower()}_block_types": [spatial.format(way), *[temporal.format(way)] * 3]
        for way in ("Down", "Up")
    }
    return {
        **sampled("EasyAnimateTransformer3DModel", flow(), **config),
        "vae": video_autoencoder("AutoencoderKLMagvit", "", spatial_group_norm=False, **types),
    }


def ltx() -> dict[str, Any]:
    """4 pixels and a frame a latent."""
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8,) * 2,
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8,) * 2,
        layers_per_block=(1,) * 3,
        decoder_layers_per_block=(1,) * 3,
        spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False),
        decoder_inject_noise=(False,) * 3,
        downsample_type=("conv",) * 2,
        upsample_residual=(False,) * 2,
        upsample_factor=(1,) * 2,
        patch_size=2,
    )
    return {
        **sampled("LTXVideoTransformer3DModel", shifting()),
        "vae": vae.eval().requires_grad_(False),
    }


def ltx2() -> dict[str, Any]:
    """Video and sound."""
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        down_block_types=("LTX2VideoDownBlock3D",),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=4,
        decoder_causal=False,
    )
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        resolution=32,
        latent_channels=2,
        mel_bins=8,
    )
    connectors = diffusers.pipelines.ltx2.LTX2TextConnectors(
        caption_channels=WIDTH,
        text_proj_in_factor=1,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
    )
    return {
        **sampled("LTX2VideoTransformer3DModel", shifting()),
        "vae": vae.eval().requires_grad_(False),
        "audio_vae": audio_vae.eval().requires_grad_(False),
        "connectors": connectors.eval().requires_grad_(False),
    }


def edm() -> Any:
    """The scheduler of Cosmos."""
    return diffusers.EDMEulerScheduler(
        sigma_min=0.002,
        sigma_max=80,
        sigma_data=0.5,
        sigma_schedule="karras",
        prediction_type="epsilon",
        final_sigmas_type="sigma_min",
    )


def guided(r: Request) -> dict[str, Any]:
    """The block that LTX-2 leaves out for its further guidance, of the few that there are."""
    return {"spatio_temporal_guidance_blocks": [1]}


def kandinsky_text(r: Request) -> dict[str, Any]:
    starts = (torch.arange(r.batch + 1) * TEXT_TOKENS).int()
    return {
        "prompt_embeds_qwen": r.text(),
        "prompt_embeds_clip": r.text(WIDTH),
        "prompt_cu_seqlens": starts,
        "negative_prompt_embeds_qwen": r.text(negative=True),
        "negative_prompt_embeds_clip": r.text(WIDTH, negative=True),
        "negative_prompt_cu_seqlens": starts,
    }


def second_text(r: Request) -> dict[str, Any]:
    return {
        "prompt_embeds_2": r.text(),
        "prompt_embeds_mask_2": r.mask(),
        "negative_prompt_embeds_2": r.text(negative=True),
        "negative_prompt_embeds_mask_2": r.mask(),
    }


def say_prompts(pipe: Any) -> None:
    """In place of the text encoder, which a pipeline with a prompt for each window wants."""

    def encode_prompt(prompt: list[str], **_: Any) -> tuple[Tensor, ...]:
        mask = text_mask(1)
        return embed(prompt), mask, embed([""]), mask

    pipe.encode_prompt = encode_prompt


def see(pipe: Any) -> None:
    """In place of an encoder of pictures."""
    pipe.encode_image = lambda image, **_: random_tensor(len(image), TEXT_TOKENS, WIDTH, seed=3)


def see_once(pipe: Any) -> None:
    """As `see`, of one picture for all of a batch."""
    pipe.encode_image = lambda image, batch_size, **_: random_tensor(
        1, TEXT_TOKENS, WIDTH, seed=3
    ).repeat(batch_size, 1, 1)


def few_picture_tokens(pipe: Any) -> None:
    """HunyuanVideo 1.5 takes 729 zeros where there is no picture."""
    pipe.vision_num_semantic_tokens = 4


class Sound(Silent):
    """In place of the autoencoder of Kandinsky's sound: 24 latents a second, one a frame."""

    config = SimpleNamespace(sample_rate=24)
    latent_hop_length = 1


VIDEO: list[PipelineEntry] = [
    pipeline("CogVideoXPipeline", cogvideox, pixels=PIXELS),
    pipeline(
        # Its scheduler takes the last prediction of the sample, too, before the timestep.
        "CogVideoXPipeline",
        lambda: cogvideox(diffusers.CogVideoXDPMScheduler()),
        pixels=PIXELS,
        variant="DPM",
    ),
    pipeline(
        "CogVideoXImageToVideoPipeline",
        lambda: cogvideox(in_channels=8),
        lambda r: {"image": r.picture()},
        pixels=PIXELS,
    ),
    pipeline(
        "CogVideoXVideoToVideoPipeline",
        cogvideox,
        lambda r: {"video": [r.video()] * r.batch},
        pixels=PIXELS,
    ),
    pipeline(
        "CogVideoXFunControlPipeline",
        lambda: cogvideox(in_channels=8),
        lambda r: {"control_video": [r.video()] * r.batch},
        pixels=PIXELS,
    ),
    pipeline("HunyuanVideoPipeline", hunyuan, pixels=PIXELS),
    pipeline(
        "HunyuanSkyreelsImageToVideoPipeline",
        lambda: hunyuan(in_channels=8, guidance_embeds=True),
        lambda r: {"image": r.picture()},
        pixels=PIXELS,
    ),
    pipeline(
        "HunyuanVideoImageToVideoPipeline",
        lambda: hunyuan(in_channels=9, guidance_embeds=False, image_condition_type="latent_concat"),
        lambda r: {"image": r.picture()},
        pixels=PIXELS,
    ),
    pipeline(
        # It makes a video in sections, the last one first, each a run.
        "HunyuanVideoFramepackPipeline",
        lambda: {
            **hunyuan(),
            "transformer": transformer("HunyuanVideoFramepackTransformer3DModel"),
        },
        lambda r: {"image": r.picture(), "latent_window_size": 2, "num_frames": 9},
        pixels=PIXELS,
        adjust=see,
    ),
    pipeline(
        # It refines a picture, as a video of one frame.
        "HunyuanImageRefinerPipeline",
        lambda: {
            "transformer": transformer(
                "HunyuanImageTransformer2DModel",
                in_channels=16,
                out_channels=8,
                patch_size=(1, 2, 2),
                rope_axes_dim=(4, 6, 6),
            ),
            "vae": diffusers.AutoencoderKLHunyuanImageRefiner(
                latent_channels=4,
                block_out_channels=(8,) * 4,
                layers_per_block=1,
                spatial_compression_ratio=8,
            )
            .eval()
            .requires_grad_(False),
            "scheduler": flow(),
            "guider": diffusers.AdaptiveProjectedMixGuidance(),
        },
        lambda r: {"image": r.picture()},
        pixels=PIXELS,
    ),
    pipeline(
        "HunyuanVideo15Pipeline",
        lambda: hunyuan15("t2v"),
        second_text,
        pixels=PIXELS,
        adjust=few_picture_tokens,
    ),
    pipeline(
        "HunyuanVideo15ImageToVideoPipeline",
        lambda: hunyuan15("i2v"),
        lambda r: second_text(r) | {"image": r.image()},
        pixels=PIXELS,
        adjust=see_once,
    ),
    pipeline("LTXPipeline", ltx, pixels=32),
    pipeline("LTXImageToVideoPipeline", ltx, lambda r: {"image": r.picture()}, pixels=32),
    pipeline(
        "LTXConditionPipeline",
        lambda: {**ltx(), "scheduler": flow()},
        lambda r: {"image": r.picture()[:1]},
        pixels=32,
    ),
    pipeline(
        # It makes a video in windows, each a run.
        "LTXI2VLongMultiPromptPipeline",
        lambda: {**ltx(), "scheduler": flow()},
        lambda r: {
            "prompt": r.words[0],
            "cond_image": r.picture()[:1],
            "num_frames": 11,
            "temporal_tile_size": 8,
            "temporal_overlap": 4,
            "seed": None,
        },
        pixels=32,
        adjust=say_prompts,
    ),
    pipeline("LTX2Pipeline", ltx2, guided, pixels=32),
    pipeline(
        "LTX2ImageToVideoPipeline",
        ltx2,
        lambda r: guided(r) | {"image": r.picture(), "image_crf": 0},
        pixels=32,
    ),
    pipeline("LTX2ConditionPipeline", ltx2, guided, pixels=32),
    pipeline("LTX2InContextPipeline", ltx2, guided, pixels=32),
    pipeline("LTX2HDRPipeline", ltx2, pixels=32),
    pipeline(
        "MochiPipeline",
        lambda: sampled("MochiTransformer3DModel", flow(invert_sigmas=True)),
        lambda r: {"num_frames": 7},
        pixels=PIXELS,
    ),
    pipeline(
        # Its scheduler adds noise in each step.
        "AllegroPipeline",
        lambda: sampled("AllegroTransformer3DModel", diffusers.EulerAncestralDiscreteScheduler()),
        pixels=PIXELS,
    ),
    pipeline(
        "LattePipeline",
        lambda: sampled("LatteTransformer3DModel", diffusers.DDIMScheduler()),
        lambda r: {"video_length": 2},
        pixels=PIXELS,
    ),
    pipeline("EasyAnimatePipeline", easyanimate, pixels=PIXELS),
    pipeline(
        "EasyAnimateInpaintPipeline",
        lambda: easyanimate(in_channels=12, resize_inpaint_mask_directly=False),
        lambda r: {
            "video": r.videos().transpose(1, 2),
            "mask_video": r.hole()[:, :, None].repeat(1, 1, 5, 1, 1),
        },
        pixels=PIXELS,
    ),
    pipeline(
        "CosmosTextToWorldPipeline",
        lambda: {
            **sampled("CosmosTransformer3DModel", edm(), max_size=(4, 16, 16)),
            "safety_checker": Silent(),
        },
        lambda r: {"num_frames": 9},
        pixels=PIXELS,
    ),
    pipeline(
        "CosmosVideoToWorldPipeline",
        lambda: {
            **sampled("CosmosTransformer3DModel", edm(), in_channels=5, max_size=(4, 16, 16)),
            "vae": diffusers.AutoencoderKLCosmos(
                latent_channels=4,
                encoder_block_out_channels=(8,) * 4,
                decode_block_out_channels=(8,) * 4,
                attention_resolutions=(8,),
                resolution=64,
                num_layers=1,
                latents_mean=None,
                latents_std=None,
            ).eval(),
            "safety_checker": Silent(),
        },
        lambda r: {"num_frames": 9, "image": r.picture()},
        pixels=PIXELS,
    ),
    pipeline(
        "Kandinsky5T2VPipeline",
        lambda: sampled("Kandinsky5Transformer3DModel", flow()),
        kandinsky_text,
        pixels=PIXELS,
    ),
    pipeline(
        "Kandinsky5I2VPipeline",
        lambda: {
            **sampled("Kandinsky5Transformer3DModel", flow(), visual_cond=True),
            "vae": hunyuan()["vae"],
        },
        lambda r: {**kandinsky_text(r), "image": r.picture(), "num_frames": 21},
        pixels=PIXELS,
    ),
    pipeline(
        "Kandinsky6TI2VAPipeline",
        lambda: {
            **sampled("Kandinsky6Transformer3DModel", flow()),
            "audio_vae": Sound(),
            "vocoder": Silent(),
        },
        pixels=PIXELS,
    ),
]
