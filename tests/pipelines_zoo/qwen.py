"""Qwen-Image: from a prompt, and from pictures."""

from __future__ import annotations

from typing import Any

from ..zoo.parts import text_mask
from .parts import (
    CoarseAutoencoder,
    PipelineEntry,
    Request,
    Silent,
    embed,
    pipeline,
    random_model,
    shifting,
    transformer,
    wan_autoencoder,
)

__all__ = ["QWEN"]


def qwen(vae: Any = None, **config: Any) -> dict[str, Any]:
    return {
        "transformer": transformer("QwenImageTransformer2DModel", **config),
        "vae": vae or wan_autoencoder(kind="AutoencoderKLQwenImage", levels=2),
        "scheduler": shifting(),
    }


def editing(**config: Any) -> dict[str, Any]:
    """For pipelines that enlarge the picture to change to a million pixels."""
    return qwen(CoarseAutoencoder(6), **config)


def with_controlnet(**config: Any) -> dict[str, Any]:
    parts = qwen()
    kept = ("in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim")
    shared = {key: parts["transformer"].config[key] for key in (*kept, "axes_dims_rope")}
    controlnet = random_model("QwenImageControlNetModel", num_layers=1, **shared, **config)
    return {**parts, "controlnet": controlnet}


def small(r: Request) -> dict[str, Any]:
    """In pixels of the coarse autoencoder."""
    return {"height": 64 * 8, "width": 64 * 8 * (1 + r.size)}


def encode_words(pipe: Any) -> None:
    """In place of the text encoder, which also says what a picture shows if there's no prompt."""
    pipe._get_qwen_prompt_embeds = lambda words, *_: (embed(words), text_mask(len(words)))


QWEN: list[PipelineEntry] = [
    pipeline("QwenImagePipeline", qwen),
    pipeline("QwenImageImg2ImgPipeline", qwen, lambda r: {"image": r.picture()}),
    pipeline(
        "QwenImageInpaintPipeline",
        qwen,
        lambda r: {"image": r.picture(), "mask_image": r.hole()},
    ),
    pipeline(
        "QwenImageControlNetPipeline", with_controlnet, lambda r: {"control_image": r.picture()}
    ),
    pipeline(
        "QwenImageControlNetInpaintPipeline",
        lambda: with_controlnet(extra_condition_channels=4),
        lambda r: {"control_image": r.picture(), "control_mask": r.hole()},
    ),
    pipeline("QwenImageEditPipeline", editing, lambda r: small(r) | {"image": r.image()}),
    pipeline("QwenImageEditPlusPipeline", editing, lambda r: small(r) | {"image": r.image()}),
    pipeline(
        "QwenImageEditInpaintPipeline",
        editing,
        lambda r: small(r) | {"image": r.image(), "mask_image": r.hole()},
    ),
    pipeline(
        "QwenImageLayeredPipeline",
        lambda: {
            **editing(use_additional_t_cond=True, use_layer3d_rope=True),
            "text_encoder": Silent(),
        },
        lambda r: {
            "image": r.image(),
            "output_type": "pt",  # it can't return latents
            "layers": 2,
            "resolution": (640, 1024)[r.size],
            "prompt": r.words,
            "negative_prompt": [""] * r.batch,
            "prompt_embeds": None,
            "negative_prompt_embeds": None,
        },
        adjust=encode_words,
    ),
]
