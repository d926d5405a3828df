"""transformers' video-language models in tiny random configurations, on frames of a real game."""

from __future__ import annotations

from typing import Any

import torch
from accel.examples.video.games import screens
from torch import Tensor, nn

__all__ = ["AFTER", "BEFORE", "MODELS"]

PATCH = 14
TEXT = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "vocab_size": 512, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 64}
PICTURE, VIDEO, STARTS, ENDS = 500, 501, 502, 503  # tokens
BEFORE, AFTER = 20, 60  # tokens of text


def frames(count: int, height: int, width: int) -> Tensor:
    """Breakout, played at random: [count, 3, height, width] in [-1, 1]."""
    shown = torch.stack(list(screens("breakout", 0, count)))
    pictures = shown.permute(0, 3, 1, 2).float() / 127.5 - 1
    return nn.functional.interpolate(pictures, (height, width), mode="area")


def patches(pictures: Tensor, together: int) -> Tensor:
    """Patches of so many pictures at a time, neighbours of 2 by 2 one after the other, as the
    models' processors order them: [patches, 3 * together * PATCH * PATCH]."""
    cut = pictures.unflatten(0, (-1, together)).unflatten(-1, (-1, 2, PATCH))
    cut = cut.unflatten(3, (-1, 2, PATCH))  # [T, together, 3, H / 2, 2, PATCH, W / 2, 2, PATCH]
    return cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).flatten(5).flatten(0, 4)


def prompt(visual: int) -> Tensor:
    """Text, so many tokens of a video, and text: int64 [1, tokens]."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(3, 400, (BEFORE + AFTER - 2,), generator=generator)
    video = torch.tensor([STARTS, *[VIDEO] * visual, ENDS])
    return torch.cat([words[: BEFORE - 1], video, words[BEFORE - 1 :]])[None]


def qwen2_5_vl() -> tuple[nn.Module, dict[str, Any]]:
    """16 tokens for every two frames."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
    vision = {
        **VISION, "depth": 1, "num_heads": 2, "out_hidden_size": 64, "patch_size": PATCH,
        "fullatt_block_indexes": [0], "window_size": 8 * PATCH,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope}, vision_config=vision,
        image_token_id=PICTURE, video_token_id=VIDEO, vision_start_token_id=STARTS,
        vision_end_token_id=ENDS,
    )  # fmt: skip
    times = 64
    pixels = patches(frames(2 * times, 8 * PATCH, 8 * PATCH), 2)
    ids = prompt(16 * times)
    return Qwen2_5_VLForConditionalGeneration(config).eval(), {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": pixels,
        "video_grid_thw": torch.tensor([[times, 8, 8]]),
        "mm_token_type_ids": (ids == VIDEO).int() * 2,
    }  # fmt: skip


def llava_onevision() -> tuple[nn.Module, dict[str, Any]]:
    """16 tokens a frame, and one at the end."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    torch.manual_seed(0)
    side, count = 8 * PATCH, 64
    vision = {
        **VISION, "model_type": "siglip_vision_model", "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": side, "patch_size": PATCH, "vision_use_head": False,
    }  # fmt: skip
    config = LlavaOnevisionConfig(
        text_config={**TEXT, "model_type": "qwen2"}, vision_config=vision,
        image_token_index=PICTURE, video_token_index=VIDEO, image_grid_pinpoints=[[side, side]],
    )  # fmt: skip
    ids = prompt(16 * count + 1)
    return LlavaOnevisionForConditionalGeneration(config).eval(), {
        "input_ids": ids, "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": frames(count, side, side)[None],
    }  # fmt: skip


def video_llama_3() -> tuple[nn.Module, dict[str, Any]]:
    """16 tokens a frame."""
    from transformers import VideoLlama3Config, VideoLlama3ForConditionalGeneration

    torch.manual_seed(0)
    count = 64
    vision = {
        **VISION, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": PATCH,
    }  # fmt: skip
    config = VideoLlama3Config(
        text_config={**TEXT, "model_type": "qwen2"}, vision_config=vision, image_token_id=PICTURE,
        video_token_id=VIDEO,
    )  # fmt: skip
    ids = prompt(16 * count)
    return VideoLlama3ForConditionalGeneration(config).eval(), {
        "input_ids": ids, "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": patches(frames(count, 8 * PATCH, 8 * PATCH), 1),
        "video_grid_thw": torch.tensor([[count, 8, 8]]), "video_merge_sizes": torch.tensor([2]),
    }  # fmt: skip


MODELS = {
    "qwen2.5-vl": qwen2_5_vl, "llava-onevision": llava_onevision, "videollama3": video_llama_3,
}  # fmt: skip
