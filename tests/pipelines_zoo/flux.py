"""Flux and the pipelines whose transformers follow it."""

from __future__ import annotations

from typing import Any

import torch

from ..zoo.parts import TEXT_TOKENS, text_mask
from .parts import (
    WIDTH,
    CoarseAutoencoder,
    PipelineEntry,
    Request,
    Silent,
    autoencoder,
    embed,
    pipeline,
    random_model,
    shifting,
    transformer,
    wan_autoencoder,
)

__all__ = ["FLUX"]

PACKED = 16  # channels of a token: 4 channels in patches of 2x2


def flux(**config: Any) -> dict[str, Any]:
    """The components; config: of the transformer."""
    return {
        "transformer": transformer("FluxTransformer2DModel", **{"in_channels": PACKED, **config}),
        "vae": autoencoder(),
        "scheduler": shifting(),
    }


def flux_control() -> dict[str, Any]:
    """The picture that controls is appended to the channels of the latent."""
    return flux(in_channels=2 * PACKED, out_channels=PACKED)


def flux_controlnet() -> dict[str, Any]:
    parts = flux()
    kept = ("patch_size", "joint_attention_dim", "pooled_projection_dim", "axes_dims_rope")
    heads = ("num_attention_heads", "attention_head_dim", "guidance_embeds")
    shared = {key: parts["transformer"].config[key] for key in (*kept, *heads)}
    controlnet = random_model(
        "FluxControlNetModel", in_channels=PACKED, num_layers=1, num_single_layers=1, **shared
    )
    return {**parts, "controlnet": controlnet}


def flux2(kind: str = "Flux2Transformer2DModel", **config: Any) -> dict[str, Any]:
    return {
        "transformer": transformer(kind, in_channels=PACKED, **config),
        "vae": autoencoder(kind="AutoencoderKLFlux2"),
        "scheduler": shifting(),
    }


def chroma() -> dict[str, Any]:
    return {**flux(), "transformer": transformer("ChromaTransformer2DModel", in_channels=PACKED)}


def painted(r: Request) -> dict[str, Any]:
    return {"image": r.picture(), "mask_image": r.hole()}


def controlled(r: Request) -> dict[str, Any]:
    return {"control_image": r.picture(1)}


def same_area(r: Request) -> dict[str, Any]:
    """The size of the result, which follows that of the picture."""
    return {"image": r.picture(), "max_area": r.height * r.width}


def say_prompts(pipe: Any) -> None:
    """In place of a text encoder, of whose every layer BRIA FIBO takes the states."""

    def encode_prompt(prompt: list[str], **_: Any) -> tuple[Any, ...]:
        layers = [embed(prompt) + layer for layer in range(7)]
        refused = [embed([""] * len(prompt)) - layer for layer in range(7)]
        positions = torch.zeros(TEXT_TOKENS, 3)
        masks = (text_mask(len(prompt)).float(),) * 2
        return layers[0], refused[0], positions, *masks, layers, refused

    pipe.encode_prompt = encode_prompt


def say_tasks(pipe: Any) -> None:
    """In place of the text encoders of VisualCloze, which refuses embeddings."""
    pipe.encode_prompt = lambda task_prompt, **_: (
        embed(task_prompt),
        embed(task_prompt, WIDTH),
        torch.zeros(TEXT_TOKENS, 3),
    )


def worded(r: Request) -> dict[str, Any]:
    """Prompts, where a pipeline that is given embeddings fails for want of them."""
    words = {"prompt": r.words, "negative_prompt": [""] * r.batch}
    return {**words, "prompt_embeds": None, "negative_prompt_embeds": None}


def encode_words(pipe: Any) -> None:
    pipe._encode_prompt = lambda words, *_: embed(words)


def without_guidance(pipe: Any) -> None:
    """Say that the transformer takes no scale of guidance, which the pipeline asks."""
    pipe.transformer.register_to_config(guidance_embeds=False)


def seen(r: Request) -> dict[str, Any]:
    """Flux.2 takes pictures of 64 pixels and more."""
    return {"image": r.image().resize((64, 64))}


FLUX: list[PipelineEntry] = [
    pipeline("FluxPipeline", flux),
    pipeline("FluxImg2ImgPipeline", flux, lambda r: {"image": r.picture()}),
    pipeline("FluxInpaintPipeline", flux, painted),
    pipeline(
        "FluxFillPipeline", lambda: flux(in_channels=3 * PACKED, out_channels=PACKED), painted
    ),
    pipeline("FluxKontextPipeline", flux, same_area),
    pipeline("FluxKontextInpaintPipeline", flux, lambda r: painted(r) | same_area(r)),
    pipeline("FluxControlPipeline", flux_control, controlled),
    pipeline(
        "FluxControlImg2ImgPipeline", flux_control, lambda r: controlled(r) | {"image": r.picture()}
    ),
    pipeline("FluxControlInpaintPipeline", flux_control, lambda r: controlled(r) | painted(r)),
    pipeline("FluxControlNetPipeline", flux_controlnet, controlled),
    pipeline(
        "FluxControlNetImg2ImgPipeline",
        flux_controlnet,
        lambda r: controlled(r) | {"image": r.picture()},
    ),
    pipeline(
        "FluxControlNetInpaintPipeline", flux_controlnet, lambda r: controlled(r) | painted(r)
    ),
    pipeline("Flux2Pipeline", flux2),
    pipeline("Flux2Pipeline", flux2, seen, variant="edit"),
    pipeline("Flux2KleinPipeline", lambda: flux2(guidance_embeds=False)),
    pipeline("Flux2KleinInpaintPipeline", lambda: flux2(guidance_embeds=False), painted),
    pipeline(
        "Flux2KleinKVPipeline",
        lambda: flux2(guidance_embeds=False),
        seen,
    ),
    pipeline(
        "VisualClozeGenerationPipeline",
        lambda: {**flux(in_channels=3 * PACKED, out_channels=PACKED), "resolution": 16},
        lambda r: {
            "task_prompt": r.words,
            "content_prompt": r.words,
            "image": [[[r.image(), r.image(1)], [r.image(2), None]]] * r.batch,
            "prompt_embeds": None,
            "pooled_prompt_embeds": None,
        },
        adjust=say_tasks,
    ),
    pipeline("ChromaPipeline", chroma),
    pipeline("ChromaImg2ImgPipeline", chroma, lambda r: {"image": r.picture()}),
    pipeline("ChromaInpaintPipeline", chroma, painted, adjust=without_guidance),
    pipeline(
        "BriaPipeline",
        lambda: {
            **flux(),
            "transformer": transformer("BriaTransformer2DModel", in_channels=PACKED),
        },
    ),
    pipeline(
        "BriaFiboPipeline",
        lambda: {
            "transformer": transformer("BriaFiboTransformer2DModel", num_single_layers=4),
            "vae": wan_autoencoder(),
            "scheduler": shifting(),
        },
        lambda r: {"prompt": r.words},
        pixels=64,
        adjust=say_prompts,
    ),
    pipeline(
        "BriaFiboEditPipeline",
        lambda: {
            "transformer": transformer("BriaFiboTransformer2DModel", num_single_layers=4),
            "vae": wan_autoencoder(),
            "scheduler": shifting(),
        },
        lambda r: {
            "prompt": [f'{{"edit_instruction": "{each}"}}' for each in r.words],
            "image": r.image(),
        },
        pixels=64,
        adjust=say_prompts,
    ),
    pipeline(
        "BriaFibo2Pipeline",
        lambda: {
            "transformer": transformer("BriaFibo2Transformer2DModel"),
            "vae": autoencoder(kind="AutoencoderKLFlux2"),
            "scheduler": shifting(),
        },
        lambda r: {
            "prompt_embeds": r.text(3, TEXT_TOKENS, WIDTH),
            "negative_prompt_embeds": r.text(3, TEXT_TOKENS, WIDTH, negative=True),
        },
    ),
    pipeline(
        "OvisImagePipeline",
        lambda: {
            **flux(),
            "transformer": transformer(
                "OvisImageTransformer2DModel", in_channels=PACKED, out_channels=PACKED
            ),
        },
    ),
    pipeline(
        "LongCatImagePipeline",
        lambda: {
            # It assumes 16 channels.
            "transformer": transformer("LongCatImageTransformer2DModel", in_channels=64),
            "vae": autoencoder(16),
            "scheduler": shifting(),
        },
        lambda r: {**worded(r), "enable_prompt_rewrite": False},
        adjust=encode_words,
    ),
    pipeline(
        "LongCatImageEditPipeline",
        lambda: {
            "transformer": transformer("LongCatImageTransformer2DModel", in_channels=64),
            "vae": CoarseAutoencoder(6, 16),
            "scheduler": shifting(),
            "text_processor": Silent(),
        },
        lambda r: {**worded(r), "image": r.image()},
        adjust=encode_words,
    ),
]
