"""Tiny random language models of transformers, of the classes that pictures are decoded with."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["KINDS", "TEXT", "chameleon", "emu3", "janus", "llama"]

TEXT: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "initializer_range": 0.2, "eos_token_id": 38, "bos_token_id": 1, "pad_token_id": 39,
}  # fmt: skip


def llama(**settings: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return _endless(LlamaForCausalLM(LlamaConfig(**TEXT | settings)))


def emu3() -> Any:
    """The language model in it, which is what speaks in pictures."""
    from transformers import Emu3ForCausalLM, Emu3TextConfig

    torch.manual_seed(0)
    return _endless(Emu3ForCausalLM(Emu3TextConfig(**TEXT)))


def chameleon() -> Any:
    """Its tokens of pictures are 30 to 33, which its `forward` never lets win."""
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    vq = {
        "base_channels": 32, "embed_dim": 8, "num_embeddings": 4, "channel_multiplier": [1, 1],
        "num_res_blocks": 1, "latent_channels": 32, "resolution": 16, "attn_resolutions": [],
    }  # fmt: skip
    names = {f"IMGIMG{letter}Z": 30 + number for number, letter in enumerate("ABCD")}
    torch.manual_seed(0)
    config = ChameleonConfig(vq_config=vq, vocabulary_map=names | {"<image>": 35}, **TEXT)
    return _endless(ChameleonForConditionalGeneration(config))


def janus() -> Any:
    """Pictures of 4 by 4 codes of 12."""
    from transformers import (
        JanusConfig,
        JanusForConditionalGeneration,
        JanusVisionConfig,
        JanusVQVAEConfig,
        LlamaConfig,
    )

    vision = JanusVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=4, image_size=16,
        mlp_ratio=1.0, projection_dim=32, num_image_tokens=16,
    )  # fmt: skip
    vq = JanusVQVAEConfig(
        embed_dim=8, num_embeddings=12, latent_channels=32, base_channels=32,
        channel_multiplier=[1, 1], num_res_blocks=1, num_patches=4, projection_dim=32,
        image_token_embed_dim=32, num_hidden_layers=1,
    )  # fmt: skip
    torch.manual_seed(0)
    config = JanusConfig(
        text_config=LlamaConfig(**TEXT), vision_config=vision, vq_config=vq, image_token_id=36
    )
    model = _endless(JanusForConditionalGeneration(config))
    for parameter in model.model.generation_head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.generation_kwargs = {"boi_token_id": 2}
    return model


def _endless(model: Any) -> Any:
    """Without a token at which `generate` stops early."""
    model.generation_config.eos_token_id = None
    return model.eval()


KINDS = {"llama": llama, "emu3": emu3, "chameleon": chameleon}
