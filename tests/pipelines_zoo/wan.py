"""Wan and the pipelines that follow it."""

from __future__ import annotations

from typing import Any

import diffusers

from ..zoo.parts import TEXT_TOKENS, random_tensor
from .parts import (
    WIDTH,
    PipelineEntry,
    Request,
    Silent,
    flow,
    pipeline,
    transformer,
    wan_autoencoder,
)

__all__ = ["WAN"]

PIXELS = 64
PICTURE_TOKENS = 512  # of the prompt, where tokens of a picture stand before them


def solver() -> Any:
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def wan(
    kind: str = "WanTransformer3DModel", scheduler: Any = None, **config: Any
) -> dict[str, Any]:
    return {
        "transformer": transformer(kind, **config),
        "vae": wan_autoencoder(),
        "scheduler": scheduler or solver(),
    }


def cosmos(scheduler: Any) -> dict[str, Any]:
    """One of the channels says which frames are given."""
    parts = wan("CosmosTransformer3DModel", scheduler, in_channels=5, max_size=(4, 16, 16))
    return {**parts, "safety_checker": Silent()}


def two_models(**config: Any) -> dict[str, Any]:
    """Wan 2.2: one transformer for the noisy half of a run, one for the rest."""
    second = transformer("WanTransformer3DModel", seed=1, **config)
    return {**wan(**config), "transformer_2": second, "boundary_ratio": 0.8}


def from_picture(r: Request) -> dict[str, Any]:
    return {"image": r.picture()[:1]}


def see(pipe: Any) -> None:
    """In place of an encoder of pictures."""
    pipe.encode_image = lambda image, device: random_tensor(1, TEXT_TOKENS, WIDTH, seed=3)


def any_size(pipe: Any) -> None:
    """JoyImage takes the nearest of its own resolutions, of a million pixels."""
    pipe.vae_image_processor.get_default_height_width = lambda image, *size: size


def seen(r: Request) -> dict[str, Any]:
    """A picture, and a prompt of the length that's expected after what is seen in it."""
    return {
        "image": r.picture()[:1],
        "prompt_embeds": r.text(PICTURE_TOKENS, WIDTH),
        "negative_prompt_embeds": r.text(PICTURE_TOKENS, WIDTH, negative=True),
    }


def refused_if_guided(r: Request) -> dict[str, Any]:
    """AnyFlow takes a negative prompt where it's guided, and only there; by default it is not."""
    guided = r.guidance is not None and r.guidance > 1
    return {"negative_prompt_embeds": r.text(negative=True) if guided else None}


WAN: list[PipelineEntry] = [
    pipeline("WanPipeline", wan, pixels=PIXELS),
    pipeline("WanPipeline", two_models, pixels=PIXELS, variant="2.2"),
    pipeline(
        # Each token has a timestep of its own.
        "WanPipeline",
        lambda: {**wan(), "expand_timesteps": True},
        pixels=PIXELS,
        variant="2.2 5B",
    ),
    pipeline("WanImageToVideoPipeline", lambda: wan(in_channels=12), from_picture, pixels=PIXELS),
    pipeline(
        "WanImageToVideoPipeline",
        lambda: two_models(in_channels=12),
        from_picture,
        pixels=PIXELS,
        variant="2.2",
    ),
    pipeline(
        "WanVideoToVideoPipeline", wan, lambda r: {"video": [r.video()] * r.batch}, pixels=PIXELS
    ),
    pipeline(
        # The mask of an 8x8 patch is folded into the channels.
        "WanVACEPipeline",
        lambda: wan("WanVACETransformer3DModel", vace_in_channels=72),
        lambda r: {"video": r.videos(), "mask": r.videos() * 0 + 1},
        pixels=PIXELS,
    ),
    pipeline(
        "WanAnimatePipeline",
        lambda: wan("WanAnimateTransformer3DModel"),
        lambda r: {
            **seen(r),
            "image": r.image(),
            "pose_video": r.video(5),
            "face_video": [each.resize((16, 16)) for each in r.video(5)],
            "segment_frame_length": 5,
        },
        pixels=PIXELS,
        adjust=see,
    ),
    pipeline(
        "ChronoEditPipeline",
        lambda: wan("ChronoEditTransformer3DModel", in_channels=12),
        seen,
        pixels=PIXELS,
        adjust=see,
    ),
    pipeline(
        "LucyEditPipeline",
        lambda: wan(in_channels=8),
        lambda r: {"video": [r.video()] * r.batch},
        pixels=PIXELS,
    ),
    pipeline("SkyReelsV2Pipeline", lambda: wan("SkyReelsV2Transformer3DModel"), pixels=PIXELS),
    pipeline(
        # The frames are at different times, each with a copy of the scheduler.
        "SkyReelsV2DiffusionForcingPipeline",
        lambda: wan("SkyReelsV2Transformer3DModel"),
        lambda r: {"ar_step": 2, "base_num_frames": 5},
        pixels=PIXELS,
    ),
    pipeline(
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        lambda: wan("SkyReelsV2Transformer3DModel"),
        lambda r: {"image": r.picture(), "base_num_frames": 5},
        pixels=PIXELS,
    ),
    pipeline(
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        lambda: wan("SkyReelsV2Transformer3DModel"),
        lambda r: {
            "video": r.video(),
            "num_frames": 9,
            "base_num_frames": 9,
            "overlap_history": 5,
        },
        pixels=PIXELS,
    ),
    pipeline(
        "SkyReelsV2ImageToVideoPipeline",
        lambda: wan(
            "SkyReelsV2Transformer3DModel",
            in_channels=12,
            image_dim=WIDTH,
            added_kv_proj_dim=24,
        ),
        seen,
        pixels=PIXELS,
        adjust=see,
    ),
    pipeline(
        "AnyFlowPipeline",
        lambda: wan("AnyFlowTransformer3DModel", diffusers.FlowMapEulerDiscreteScheduler()),
        refused_if_guided,
        pixels=PIXELS,
    ),
    pipeline(
        "AnyFlowFARPipeline",
        lambda: wan(
            "AnyFlowFARTransformer3DModel",
            diffusers.FlowMapEulerDiscreteScheduler(),
            full_chunk_limit=2,
        ),
        refused_if_guided,
        pixels=PIXELS,
    ),
    pipeline(
        # It makes a video in chunks, each a run.
        "HeliosPipeline",
        lambda: wan(
            "HeliosTransformer3DModel", diffusers.HeliosScheduler(stages=1, stage_range=[0, 1])
        ),
        lambda r: {"history_sizes": [4, 2, 1], "num_latent_frames_per_chunk": 2, "num_frames": 9},
        pixels=PIXELS,
    ),
    pipeline(
        # The resolution grows in a run, each with timesteps of its own.
        "HeliosPyramidPipeline",
        lambda: wan("HeliosTransformer3DModel", diffusers.HeliosScheduler(gamma=0.3)),
        lambda r: {
            "history_sizes": [4, 2, 1],
            "num_latent_frames_per_chunk": 2,
            "pyramid_num_inference_steps_list": [r.steps // 3] * 3,
        },
        pixels=2 * PIXELS,
    ),
    pipeline(
        "MotifVideoPipeline",
        lambda: {
            **wan("MotifVideoTransformer3DModel", flow(), in_channels=9),
            "guider": diffusers.ClassifierFreeGuidance(),
        },
        pixels=PIXELS,
    ),
    pipeline(
        "MotifVideoImage2VideoPipeline",
        lambda: {
            **wan("MotifVideoTransformer3DModel", flow(), in_channels=9),
            "guider": diffusers.ClassifierFreeGuidance(),
        },
        lambda r: {"image": r.image()},
        pixels=PIXELS,
    ),
    pipeline(
        "SanaVideoPipeline",
        lambda: wan("SanaVideoTransformer3DModel", flow()),
        lambda r: {"frames": 5},
        pixels=PIXELS,
    ),
    pipeline(
        "SanaImageToVideoPipeline",
        lambda: wan("SanaVideoTransformer3DModel", flow()),
        lambda r: {"frames": 5, "image": r.picture()[:1]},
        pixels=PIXELS,
    ),
    pipeline(
        "JoyImageEditPipeline",
        lambda: wan("JoyImageEditTransformer3DModel", flow()),
        lambda r: {"image": r.image()},
        pixels=PIXELS,
        adjust=any_size,
    ),
    pipeline(
        "Cosmos2VideoToWorldPipeline",
        lambda: {
            **cosmos(flow(use_karras_sigmas=True)),
        },
        lambda r: {"image": r.picture()},
        pixels=PIXELS,
    ),
    pipeline(
        "Cosmos2_5_PredictBasePipeline",
        lambda: {
            **cosmos(solver()),
        },
        pixels=PIXELS,
    ),
]
