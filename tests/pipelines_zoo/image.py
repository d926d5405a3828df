"""Pipelines that make or change pictures, but for those that follow Flux and Qwen-Image."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from ..zoo import ENTRIES
from ..zoo.parts import TEXT_TOKENS
from .parts import (
    WIDTH,
    PipelineEntry,
    Request,
    Silent,
    autoencoder,
    embed,
    flow,
    pipeline,
    random_model,
    shifting,
    transformer,
    wan_autoencoder,
)

__all__ = ["IMAGE"]


def sampled(kind: str, scheduler: Any, **config: Any) -> dict[str, Any]:
    """A transformer, as it's in the zoo but for a few settings, and a scheduler."""
    return {"transformer": transformer(kind, **config), "scheduler": scheduler}


def solver() -> Any:
    return diffusers.DPMSolverMultistepScheduler()


def flow_solver() -> Any:
    return diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def painted(r: Request) -> dict[str, Any]:
    return {"image": r.picture(), "mask_image": r.hole()}


def changed(r: Request) -> dict[str, Any]:
    return {"image": r.picture()}


def controlled(r: Request) -> dict[str, Any]:
    return {"control_image": r.picture(1)}


def sd3(scheduler: Any = None, channels: int = 4, **config: Any) -> dict[str, Any]:
    sizes = {"pos_embed_max_size": 16, "in_channels": channels, "out_channels": channels}
    model = transformer("SD3Transformer2DModel", **sizes, **config)
    return {"transformer": model, "scheduler": scheduler or flow(), "vae": autoencoder(channels)}


def sd3_pag() -> dict[str, Any]:
    """Its guidance knows no blocks with a second attention."""
    return sd3(dual_attention_layers=())


def sd3_controlnet(**config: Any) -> dict[str, Any]:
    parts = sd3()
    kept = {
        key: each
        for key, each in parts["transformer"].config.items()
        if not key.startswith("_") and key not in ("num_layers", "dual_attention_layers")
    }
    controlnet = random_model("SD3ControlNetModel", num_layers=1, **{**kept, **config})
    return {**parts, "controlnet": controlnet}


def hunyuan() -> dict[str, Any]:
    return {
        **sampled("HunyuanDiT2DModel", diffusers.DDPMScheduler()),
        "vae": autoencoder(levels=4),
        "requires_safety_checker": False,
    }


def hunyuan_controlnet() -> Any:
    kept = ("num_attention_heads", "attention_head_dim", "in_channels", "patch_size", "mlp_ratio")
    text = ("cross_attention_dim", "cross_attention_dim_t5", "pooled_projection_dim")
    sizes = ("sample_size", "hidden_size", "text_len", "text_len_t5")
    config = ENTRIES["HunyuanDiT2DModel"].config
    return random_model(
        "HunyuanDiT2DControlNetModel",
        transformer_num_layers=6,
        conditioning_channels=4,
        **{key: config[key] for key in (*kept, *text, *sizes)},
    )


def hunyuan_text(r: Request) -> dict[str, Any]:
    """The second prompt, of T5."""
    return {
        "prompt_embeds_2": r.text(),
        "negative_prompt_embeds_2": r.text(negative=True),
        "prompt_attention_mask_2": r.mask(),
        "negative_prompt_attention_mask_2": r.mask(),
        "original_size": (64, 64),
    }


def listed(r: Request) -> dict[str, Any]:
    """Prompts of Z-Image and ERNIE: a list of those of each sample."""
    return {
        "prompt_embeds": list(r.text()),
        "negative_prompt_embeds": list(r.text(negative=True)),
    }


def z_image() -> dict[str, Any]:
    return {**sampled("ZImageTransformer2DModel", flow()), "vae": autoencoder()}


def deep_compression() -> Any:
    """Two pixels a latent."""
    return diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
    ).eval()


def z_image_controlnet(channels: int) -> dict[str, Any]:
    controlnet = random_model(
        "ZImageControlNetModel",
        control_layers_places=[0, 2],
        control_refiner_layers_places=[0, 1],
        control_in_dim=channels,
        dim=32,
        n_refiner_layers=2,
        n_heads=2,
        n_kv_heads=2,
    )
    return {**z_image(), "controlnet": controlnet}


def small_area(pipe: Any) -> None:
    """HiDream enlarges every resolution to the area of its default one."""
    pipe.default_sample_size = 8


def say_prompts(pipe: Any) -> None:
    """In place of the text encoder of Ideogram."""

    def encode_prompt(
        prompt: list[str], grid_h: int, grid_w: int, max_sequence_length: int, device: Any
    ) -> tuple[Any, ...]:
        lengths = [max_sequence_length - 1] * len(prompt)
        ids = pipe._prepare_ids(lengths, grid_h, grid_w, max_sequence_length, device)
        text = embed(prompt, max_sequence_length, WIDTH)
        return torch.nn.functional.pad(text, (0, 0, 0, grid_h * grid_w)), *ids

    pipe.encode_prompt = encode_prompt


def few_resolutions(pipe: Any) -> None:
    """Kandinsky takes the nearest of its own resolutions."""
    pipe.resolutions = [(64, 64), (128, 64)]


def kandinsky_text(r: Request) -> dict[str, Any]:
    starts = torch.arange(r.batch + 1) * TEXT_TOKENS
    return {
        "prompt_embeds_qwen": r.text(),
        "prompt_embeds_clip": r.text(WIDTH),
        "prompt_cu_seqlens": starts.int(),
        "negative_prompt_embeds_qwen": r.text(negative=True),
        "negative_prompt_embeds_clip": r.text(WIDTH, negative=True),
        "negative_prompt_cu_seqlens": starts.int(),
    }


IMAGE: list[PipelineEntry] = [
    pipeline("StableDiffusion3Pipeline", sd3),
    pipeline(
        # It calls the transformer twice a step, at two times.
        "StableDiffusion3Pipeline",
        lambda: sd3(diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)),
        variant="Heun",
    ),
    pipeline("StableDiffusion3Img2ImgPipeline", sd3, changed),
    pipeline("StableDiffusion3InpaintPipeline", lambda: sd3(channels=16), painted),
    pipeline("StableDiffusion3ControlNetPipeline", sd3_controlnet, controlled),
    pipeline(
        "StableDiffusion3ControlNetInpaintingPipeline",
        lambda: sd3_controlnet(extra_conditioning_channels=1),
        lambda r: controlled(r) | {"control_mask": r.hole()},
    ),
    pipeline("StableDiffusion3PAGPipeline", sd3_pag),
    pipeline("StableDiffusion3PAGImg2ImgPipeline", sd3_pag, changed),
    pipeline(
        "PixArtAlphaPipeline", lambda: sampled("PixArtTransformer2DModel", solver()), pixels=64
    ),
    pipeline(
        "PixArtSigmaPipeline", lambda: sampled("PixArtTransformer2DModel", solver()), pixels=64
    ),
    pipeline(
        "PixArtSigmaPAGPipeline",
        lambda: sampled("PixArtTransformer2DModel", solver()),
        pixels=64,
    ),
    pipeline("SanaPipeline", lambda: sampled("SanaTransformer2DModel", flow_solver()), pixels=256),
    pipeline(
        "SanaPAGPipeline", lambda: sampled("SanaTransformer2DModel", flow_solver()), pixels=256
    ),
    pipeline(
        # Its scheduler adds noise in each step.
        "SanaSprintPipeline",
        lambda: sampled("SanaTransformer2DModel", diffusers.SCMScheduler(), guidance_embeds=True),
        lambda r: {"intermediate_timesteps": None},
        pixels=256,
    ),
    pipeline(
        "SanaSprintImg2ImgPipeline",
        lambda: {
            **sampled("SanaTransformer2DModel", diffusers.SCMScheduler(), guidance_embeds=True),
            "vae": deep_compression(),
        },
        lambda r: changed(r) | {"intermediate_timesteps": None},
        pixels=32,
    ),
    pipeline(
        "SanaControlNetPipeline",
        lambda: {
            **sampled("SanaTransformer2DModel", flow_solver()),
            "vae": deep_compression(),
            "controlnet": random_model(
                "SanaControlNetModel",
                **{**ENTRIES["SanaTransformer2DModel"].config, "num_layers": 2},
            ),
        },
        controlled,
        pixels=32,
    ),
    pipeline("LuminaPipeline", lambda: sampled("LuminaNextDiT2DModel", flow()), pixels=64),
    pipeline(
        "Lumina2Pipeline",
        lambda: {
            "transformer": random_model(
                "Lumina2Transformer2DModel",
                sample_size=8,
                in_channels=4,
                hidden_size=32,
                num_layers=3,
                num_refiner_layers=1,
                num_attention_heads=2,
                num_kv_heads=1,
                multiple_of=16,
                axes_dim_rope=(4, 6, 6),
                axes_lens=(64, 16, 16),
                cap_feat_dim=WIDTH,
            ),
            "scheduler": shifting(),
        },
        pixels=64,
    ),
    pipeline("HunyuanDiTPipeline", hunyuan, hunyuan_text, pixels=64),
    pipeline("HunyuanDiTPAGPipeline", hunyuan, hunyuan_text, pixels=64),
    pipeline(
        "HunyuanDiTControlNetPipeline",
        lambda: {**hunyuan(), "controlnet": hunyuan_controlnet()},
        lambda r: hunyuan_text(r) | controlled(r),
        pixels=64,
    ),
    pipeline(
        "AuraFlowPipeline",
        lambda: sampled("AuraFlowTransformer2DModel", flow(), pos_embed_max_size=64),
        pixels=64,
    ),
    pipeline(
        "CogView3PlusPipeline",
        lambda: sampled(
            "CogView3PlusTransformer2DModel",
            diffusers.CogVideoXDDIMScheduler(rescale_betas_zero_snr=True),
        ),
        pixels=64,
    ),
    pipeline(
        "CogView4Pipeline", lambda: sampled("CogView4Transformer2DModel", shifting()), pixels=64
    ),
    pipeline(
        "CogView4ControlPipeline",
        lambda: {
            **sampled("CogView4Transformer2DModel", shifting(), in_channels=8),
            "vae": autoencoder(levels=4),
        },
        controlled,
        pixels=64,
    ),
    pipeline(
        "HiDreamImagePipeline",
        lambda: sampled("HiDreamImageTransformer2DModel", flow()),
        lambda r: {
            "prompt_embeds_t5": r.text(),
            "negative_prompt_embeds_t5": r.text(negative=True),
            "prompt_embeds_llama3": torch.stack([r.text(), r.text() + 1]),
            "negative_prompt_embeds_llama3": torch.stack([r.text(negative=True)] * 2),
        },
        pixels=64,
        adjust=small_area,
    ),
    pipeline("ZImagePipeline", z_image, listed),
    pipeline("ZImageImg2ImgPipeline", z_image, lambda r: listed(r) | changed(r)),
    pipeline("ZImageInpaintPipeline", z_image, lambda r: listed(r) | painted(r)),
    pipeline(
        "ZImageControlNetPipeline",
        lambda: z_image_controlnet(4),
        lambda r: listed(r) | controlled(r),
    ),
    pipeline(
        "ZImageControlNetInpaintPipeline",
        lambda: z_image_controlnet(9),
        lambda r: listed(r) | controlled(r) | painted(r),
    ),
    pipeline(
        # The only size is the transformer's.
        "DiTPipeline",
        lambda: {
            **sampled("DiTTransformer2DModel", diffusers.DDIMScheduler(), num_embeds_ada_norm=1000),
            "vae": autoencoder(),
        },
        lambda r: {"class_labels": [r.prompt % 10] * r.batch, "output_type": "np"},
    ),
    pipeline("PRXPipeline", lambda: sampled("PRXTransformer2DModel", flow()), pixels=64),
    pipeline(
        "PRXPixelPipeline",
        lambda: sampled("PRXTransformer2DModel", flow(), in_channels=3),
    ),
    pipeline(
        "GlmImagePipeline",
        lambda: sampled("GlmImageTransformer2DModel", flow()),
        lambda r: {
            "prior_token_ids": torch.arange(16 * (1 + r.size)).repeat(r.batch, 1),
        },
        pixels=64,
    ),
    pipeline(
        "ErnieImagePipeline",
        lambda: sampled("ErnieImageTransformer2DModel", flow()),
        listed,
        pixels=128,
    ),
    pipeline(
        "Krea2Pipeline",
        lambda: sampled("Krea2Transformer2DModel", shifting(), in_channels=16),
        lambda r: {
            "prompt_embeds": r.text(TEXT_TOKENS, 3, WIDTH),
            "negative_prompt_embeds": r.text(TEXT_TOKENS, 3, WIDTH, negative=True),
        },
        pixels=64,
    ),
    pipeline(
        "NucleusMoEImagePipeline",
        lambda: sampled("NucleusMoEImageTransformer2DModel", shifting()),
        pixels=64,
    ),
    pipeline(
        "Kandinsky5T2IPipeline",
        lambda: sampled("Kandinsky5Transformer3DModel", flow()),
        kandinsky_text,
        pixels=64,
        adjust=few_resolutions,
    ),
    pipeline(
        "Kandinsky5I2IPipeline",
        lambda: {
            **sampled("Kandinsky5Transformer3DModel", flow(), visual_cond=True),
            "vae": autoencoder(levels=4),
        },
        lambda r: {**kandinsky_text(r), "image": r.picture()},
        pixels=64,
        adjust=few_resolutions,
    ),
    pipeline(
        # It samples with a second transformer, for the negative prompt, that's named otherwise.
        "Ideogram4Pipeline",
        lambda: {
            **sampled("Ideogram4Transformer2DModel", flow()),
            "unconditional_transformer": transformer("Ideogram4Transformer2DModel", seed=1),
        },
        lambda r: {
            "prompt": r.words,
            "max_sequence_length": TEXT_TOKENS,
            "guidance_scale": 7.0 if r.guidance is None else r.guidance,
            "guidance_schedule": None,
        },
        pixels=64,
        adjust=say_prompts,
    ),
    pipeline(
        "HunyuanImagePipeline",
        lambda: {
            **sampled("HunyuanImageTransformer2DModel", flow()),
            "guider": diffusers.AdaptiveProjectedMixGuidance(),
        },
        lambda r: {
            "prompt_embeds_2": r.text(),
            "prompt_embeds_mask_2": r.mask(),
            "negative_prompt_embeds_2": r.text(negative=True),
            "negative_prompt_embeds_mask_2": r.mask(),
        },
        pixels=256,
    ),
    pipeline(
        "Cosmos2TextToImagePipeline",
        lambda: {
            **sampled(
                "CosmosTransformer3DModel", flow(use_karras_sigmas=True), max_size=(1, 16, 16)
            ),
            "vae": wan_autoencoder(),
            "safety_checker": Silent(),
        },
        pixels=64,
    ),
]
