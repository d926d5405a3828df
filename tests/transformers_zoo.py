"""Tiny random models of many classes of transformers, and a call of each as its users make it.

Most configs of transformers name the same few sizes in the same few ways: `SIZES` has them all, and
a config takes those that it knows. Sizes that a model needs besides are given where it is listed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = [
    "DECODERS",
    "ENCODERS",
    "ENCODER_DECODERS",
    "KINDS",
    "VISION_LANGUAGE",
    "build",
    "decoder",
]

TOKENS = 64  # in the vocabulary
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), TOKENS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("embedding_size", "hidden_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    "num_key_value_heads": 2,
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff", "dff"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 256),
    **dict.fromkeys(("head_dim", "d_kv"), 8),
    "rotary_dim": 4,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "first_k_dense_replace": 1,
    **dict.fromkeys(("n_group", "topk_group"), 1),
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "qk_head_dim": 12,
    "sliding_window": 8,
    "initializer_range": 0.2,
    "image_size": 16,
    "patch_size": 8,
    "state_size": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Models that continue a text, with what their configs need besides.
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi": {"num_key_value_heads": 4},
    "phi3": {},
    "gpt2": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gpt_neox": {},
    "gptj": {},
    "gpt_bigcode": {},
    "opt": {},
    "bloom": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "mpt": {},
    "ctrl": {},
    "xglm": {},
    "bert": {"is_decoder": True},
    "olmo2": {},
    "cohere": {},
    "granite": {},
    "starcoder2": {},
    "persimmon": {},
    "diffllama": {},
    "doge": {},
    "mixtral": {},
    "qwen2_moe": {},
    "gpt_oss": {"layer_types": ["full_attention", "full_attention"]},
    "deepseek_v3": {"head_dim": 4, "num_key_value_heads": 4},
    "mamba": {},
}
# Models that make a text or a picture into vectors.
ENCODERS: dict[str, dict[str, Any]] = {
    "albert": {},
    "bert": {},
    "distilbert": {},
    "electra": {},
    "deberta-v2": {},
    "modernbert": {},
    "mpnet": {},
    "vit": {},
    "beit": {},
    "dinov2": {},
    "convnext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "wav2vec2": {
        "conv_dim": [8, 8], "conv_stride": [5, 4], "conv_kernel": [10, 8],
        "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0,
    },
}  # fmt: skip
# Models that read one sequence and write another.
ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "t5": {},
    "bart": {},
    "marian": {"decoder_start_token_id": 0},
    "whisper": {
        "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32,
        "decoder_start_token_id": 1,
    },
}  # fmt: skip
_TEXT = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers",
         "num_attention_heads", "intermediate_size", "max_position_embeddings", "pad_token_id",
         "bos_token_id", "eos_token_id")}  # fmt: skip
_GROUPED = _TEXT | {"num_key_value_heads": 2, "head_dim": 8}
_PICTURE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 48, "image_size": 16, "patch_size": 8}  # fmt: skip
IMAGE = 5  # the token that stands for a patch of the picture
# Models that see pictures and read text.
VISION_LANGUAGE: dict[str, dict[str, Any]] = {
    "clip": {"text_config": _TEXT, "vision_config": _PICTURE, "projection_dim": 16},
    "siglip": {"text_config": _TEXT | {"projection_size": 32}, "vision_config": _PICTURE},
    "blip": {"text_config": _TEXT, "vision_config": _PICTURE, "projection_dim": 16},
    "llava": {
        "text_config": _GROUPED | {"model_type": "llama"},
        "vision_config": _PICTURE | {"model_type": "clip_vision_model"}, "image_token_index": IMAGE,
    },
    "paligemma": {
        "text_config": _GROUPED | {"model_type": "gemma"},
        "vision_config": _PICTURE | {"model_type": "siglip_vision_model", "projection_dim": 32},
        "image_token_index": IMAGE, "projection_dim": 32, "vocab_size": TOKENS,
    },
    "idefics3": {
        "text_config": _GROUPED | {"model_type": "llama"}, "vision_config": _PICTURE,
        "image_token_id": IMAGE, "scale_factor": 1,
    },
    "vilt": {"hidden_size": 32, "max_image_length": -1},
    "git": {"vision_config": _PICTURE},
}  # fmt: skip
KINDS = {
    **{f"decoder {name}": each for name, each in DECODERS.items()},
    **{f"encoder {name}": each for name, each in ENCODERS.items()},
    **{f"encoder-decoder {name}": each for name, each in ENCODER_DECODERS.items()},
    **{f"vision-language {name}": each for name, each in VISION_LANGUAGE.items()},
}


def decoder(name: str) -> Any:
    """One of `DECODERS`."""
    return build(f"decoder {name}")[0]


def build(kind: str) -> tuple[Any, dict[str, Tensor]]:
    """One of `KINDS`, and inputs for it."""
    import transformers

    group, name = kind.split(" ")
    automatic = {
        "decoder": transformers.AutoModelForCausalLM,
        "encoder": transformers.AutoModel,
        "encoder-decoder": transformers.AutoModelForSeq2SeqLM,
        "vision-language": transformers.AutoModelForImageTextToText,
    }[group]
    if name == "whisper":
        automatic = transformers.AutoModelForSpeechSeq2Seq
    if name in ("clip", "siglip", "vilt"):
        automatic = transformers.AutoModel
    config = _config(transformers.CONFIG_MAPPING[name], KINDS[kind])
    torch.manual_seed(0)
    model = automatic.from_config(config).eval()
    return model, _inputs(group, model)


def _config(kind: type, changes: dict[str, Any]) -> Any:
    """A config of the sizes that it knows, with these changes."""
    default = kind()

    def takes(name: str) -> bool:
        settable = getattr(getattr(kind, name, None), "fset", True) is not None
        return settable and getattr(default, name, None) is not None

    known = {name: size for name, size in SIZES.items() if takes(name)}
    if hasattr(default, "num_key_value_heads"):  # None stands for as many as queries have
        known["num_key_value_heads"] = SIZES["num_key_value_heads"]
    if takes("layer_types"):  # each once, and two at least
        types = list(dict.fromkeys(default.layer_types))
        known["layer_types"] = (types * 2)[: max(2, len(types))]
        known["num_hidden_layers"] = len(known["layer_types"])
    return kind(**{**known, **changes})


def _inputs(group: str, model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def tokens(count: int) -> Tensor:
        return torch.randint(6, TOKENS, (2, count), generator=generator)

    picture = torch.randn(2, 3, 16, 16, generator=generator)
    main = model.main_input_name
    if group == "vision-language":
        ids = tokens(12)
        if IMAGE in (getattr(model.config, "image_token_id", None),
                     getattr(model.config, "image_token_index", None)):  # fmt: skip
            ids[:, 1:5] = IMAGE
        if model.config.model_type == "idefics3":
            picture = picture[:, None]
        seen = {"input_ids": ids, "pixel_values": picture}
        if model.config.model_type == "paligemma":  # else torch.compile itself gives other logits
            there = torch.ones_like(ids)
            seen |= {"attention_mask": there, "token_type_ids": (ids != IMAGE).long()}
        return seen
    if main == "pixel_values":
        return {main: picture}
    if main == "input_values":
        return {main: torch.randn(2, 400, generator=generator)}
    if main == "input_features":
        features = torch.randn(2, 8, 32, generator=generator)
        return {main: features, "decoder_input_ids": tokens(5)}
    inputs = {"input_ids": tokens(12)}
    if group == "encoder-decoder":
        inputs["decoder_input_ids"] = tokens(5)
    return inputs
