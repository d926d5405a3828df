"""Transformers of audio, proteins, embeddings and single features over time."""

from __future__ import annotations

import torch

from .parts import (
    IMAGE_TOKENS,
    NARROW,
    TEXT_TOKENS,
    WIDE,
    Entry,
    at_time,
    call_inputs,
    config_of,
    pooled_text,
    prompted_inputs,
    random_tensor,
    rotary_pair,
    text_mask,
    text_states,
    token_latent,
)

OTHER: list[Entry] = [
    Entry(
        "AceStepTransformer1DModel",
        config_of(
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
        lambda b: call_inputs(
            hidden_states=token_latent(b),
            context_latents=random_tensor(b, IMAGE_TOKENS, 8, seed=2),
            encoder_hidden_states=text_states(b, 32),
            timestep=at_time(b, 0.5),
            timestep_r=at_time(b, 0.25),
        ),
    ),
    Entry(
        "LongCatAudioDiTTransformer",
        config_of(dit_dim=32, dit_depth=4, dit_heads=4, dit_text_dim=16, latent_dim=4, ff_mult=2.0),
        lambda b: prompted_inputs(
            token_latent(b),
            time=0.5,
            encoder_attention_mask=text_mask(b),
            attention_mask=text_mask(b, IMAGE_TOKENS),
            latent_cond=random_tensor(b, IMAGE_TOKENS, 4, seed=2),
        ),
    ),
    Entry(
        "MiniMaxMusic3Transformer1DModel",
        config_of(WIDE, condition_dim=16, ff_inner_dim=64, rotary_dim=8, fourier_embedding_dim=16),
        lambda b: call_inputs(
            hidden_states=random_tensor(b, 4, IMAGE_TOKENS),
            encoder_hidden_states=random_tensor(b, IMAGE_TOKENS, 16, seed=1),
            timestep=at_time(b, 0.5),
        ),
    ),
    Entry(
        "PriorTransformer",
        config_of(
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=4,
            embedding_dim=16,
            num_embeddings=TEXT_TOKENS,
        ),
        lambda b: prompted_inputs(
            random_tensor(b, 16), proj_embedding=pooled_text(b), attention_mask=text_mask(b)
        ),
    ),
    Entry(
        # A protein: the noisy backbone and the noisy latents have timesteps of their own.
        "RFD4ProteinaTransformer",
        config_of(
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
        lambda b: call_inputs(
            bb_ca=random_tensor(b, 8, 3),
            local_latents=random_tensor(b, 8, 4, seed=1),
            bb_ca_time=at_time(b, 0.5),
            local_latents_time=at_time(b, 0.5),
            padding_mask=text_mask(b, 8),
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
        "StableAudioDiTModel",
        config_of(
            NARROW,
            sample_size=IMAGE_TOKENS,
            num_key_value_attention_heads=2,
            out_channels=4,
            cross_attention_dim=16,
            time_proj_dim=8,
            global_states_input_dim=16,
            cross_attention_input_dim=16,
        ),
        # The rotary embedding covers half of a head; the global state is one more token.
        lambda b: prompted_inputs(
            random_tensor(b, 4, IMAGE_TOKENS),
            time=0.5,
            global_hidden_states=random_tensor(b, 1, 16, seed=2),
            rotary_embedding=rotary_pair(IMAGE_TOKENS + 1, 4),
        ),
    ),
    Entry(
        "StableAudio3DiTModel",
        config_of(
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
        lambda b: prompted_inputs(
            random_tensor(b, 4, IMAGE_TOKENS),
            time=0.5,
            encoder_attention_mask=text_mask(b),
            global_hidden_states=pooled_text(b),
            local_add_cond=random_tensor(b, 5, IMAGE_TOKENS, seed=3),
        ),
    ),
    Entry(
        "T5FilmDecoder",
        config_of(
            input_dims=4, targets_length=8, d_model=32, num_layers=4, num_heads=4, d_kv=8, d_ff=64
        ),
        lambda b: {  # it has no return_dict: the output is a tensor
            "encodings_and_masks": [(text_states(b, 32), torch.ones(b, TEXT_TOKENS))],
            "decoder_input_tokens": random_tensor(b, 8, 4),
            "decoder_noise_time": at_time(b, 0.5),
        },
        timestep="decoder_noise_time",
        latent="decoder_input_tokens",
    ),
    Entry(
        "TransformerTemporalModel",
        config_of(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=32,
            num_layers=4,
            norm_num_groups=8,
        ),
        lambda b: call_inputs(
            hidden_states=random_tensor(3 * b, 32, 2, 2), num_frames=3, timestep=at_time(b)
        ),
    ),
]
