"""Transformers that make images."""

from __future__ import annotations

import torch

from .parts import (
    FLUX,
    HUNYUAN,
    IMAGE_TOKENS,
    NARROW,
    PIXART,
    TEXT_TOKENS,
    WIDE,
    Entry,
    at_time,
    call_inputs,
    config_of,
    flux_inputs,
    grid_positions,
    image_latent,
    pooled_text,
    prompted_inputs,
    random_tensor,
    rotary_angles,
    rotary_pair,
    text_mask,
    text_states,
    token_latent,
)

IMAGE: list[Entry] = [
    Entry(
        "AuraFlowTransformer2DModel",
        config_of(
            sample_size=8,
            num_mmdit_layers=3,
            num_single_dit_layers=4,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=16,
            caption_projection_dim=32,
            pos_embed_max_size=16,
        ),
        lambda b: prompted_inputs(image_latent(b), time=0.5),
    ),
    Entry("BriaTransformer2DModel", FLUX, lambda b: flux_inputs(b, time=500.0)),
    Entry(
        "BriaFiboTransformer2DModel",
        config_of(FLUX, text_encoder_dim=16),
        lambda b: flux_inputs(
            b,
            time=500.0,
            text_encoder_layers=[text_states(b, seed=10 + layer) for layer in range(7)],
        ),
    ),
    Entry(
        "BriaFibo2Transformer2DModel",
        config_of(
            in_channels=4,
            dim=32,
            n_layers=4,
            n_heads=2,
            cap_feat_dim=16,
            injection_layer_ids=(1, 3),
            min_num_gist_tokens=2,
            max_num_gist_tokens=4,
            gist_step=1,
            gist_min_text_len=2,
            gist_max_text_len=8,
            axes_dims=(4, 6, 6),
            axes_lens=(16, 16, 16),
        ),
        # No mask of the prompt: the number of gist tokens is read from its values.
        lambda b: call_inputs(
            hidden_states=image_latent(b),
            encoder_hidden_states=random_tensor(b, 3, TEXT_TOKENS, 16, seed=1),
            timestep=at_time(b, 0.5),
        ),
    ),
    Entry(
        "ChromaTransformer2DModel",
        config_of(
            FLUX, approximator_num_channels=16, approximator_hidden_dim=32, approximator_layers=2
        ),
        lambda b: flux_inputs(b, attention_mask=text_mask(b, TEXT_TOKENS + IMAGE_TOKENS)),
    ),
    Entry(
        "CogView3PlusTransformer2DModel",
        config_of(
            NARROW,
            out_channels=4,
            text_embed_dim=16,
            time_embed_dim=16,
            condition_dim=4,
            pos_embed_max_size=8,
            sample_size=8,
        ),
        lambda b: prompted_inputs(
            image_latent(b),
            original_size=torch.full((b, 2), 64.0),
            target_size=torch.full((b, 2), 64.0),
            crop_coords=torch.zeros(b, 2),
        ),
    ),
    Entry(
        "CogView4Transformer2DModel",
        config_of(
            NARROW,
            out_channels=4,
            text_embed_dim=16,
            time_embed_dim=16,
            condition_dim=4,
            pos_embed_max_size=8,
            sample_size=8,
            rope_axes_dim=(8, 8),
        ),
        lambda b: prompted_inputs(
            image_latent(b),
            original_size=torch.full((b, 2), 64.0),
            target_size=torch.full((b, 2), 64.0),
            crop_coords=torch.zeros(b, 2),
        ),
    ),
    Entry(
        "DiTTransformer2DModel",
        config_of(
            num_attention_heads=4,
            attention_head_dim=8,
            out_channels=8,
            num_layers=4,
            sample_size=8,
            num_embeds_ada_norm=10,
        ),
        lambda b: call_inputs(
            hidden_states=image_latent(b), timestep=at_time(b), class_labels=torch.arange(b) % 10
        ),
    ),
    Entry(
        "DreamLiteTransformer2DModel",
        config_of(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=32,
            num_layers=4,
            norm_num_groups=8,
            cross_attention_dim=16,
        ),
        lambda b: prompted_inputs(random_tensor(b, 32, 4, 4)),
    ),
    Entry(
        # The lengths of the two prompts, 77 and 257 tokens, are fixed.
        "DualTransformer2DModel",
        config_of(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=32,
            num_layers=4,
            norm_num_groups=8,
            cross_attention_dim=16,
        ),
        lambda b: call_inputs(
            hidden_states=random_tensor(b, 32, 4, 4),
            encoder_hidden_states=random_tensor(b, 77 + 257, 16, seed=1),
            timestep=at_time(b),
        ),
    ),
    Entry(
        "ErnieImageTransformer2DModel",
        config_of(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=4,
            ffn_hidden_size=64,
            in_channels=4,
            out_channels=4,
            patch_size=2,
            text_in_dim=16,
            rope_axes_dim=(4, 6, 6),
        ),
        lambda b: call_inputs(
            hidden_states=image_latent(b),
            text_bth=text_states(b),
            text_lens=torch.full((b,), TEXT_TOKENS - 1),
            timestep=at_time(b),
        ),
    ),
    Entry(
        "FluxTransformer2DModel",
        config_of(FLUX, pooled_projection_dim=16, guidance_embeds=True),
        lambda b: flux_inputs(b, pooled_projections=pooled_text(b), guidance=at_time(b, 3.5)),
    ),
    Entry(
        "Flux2Transformer2DModel",
        config_of(FLUX, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4)),
        lambda b: flux_inputs(b, axes=4, guidance=at_time(b, 3.5)),
    ),
    Entry(
        "Flux3Transformer2DModel",
        config_of(FLUX, cond_in_channels=4, timestep_channels=16, axes_dims_rope=(4, 4, 4, 4)),
        lambda b: flux_inputs(
            b,
            axes=4,
            image_cond_hidden_states=random_tensor(b, 4, 4, seed=3),
            image_cond_ids=torch.nn.functional.pad(grid_positions(2, 2), (1, 1), value=1).float(),
        ),
    ),
    Entry(
        "GlmImageTransformer2DModel",
        config_of(
            NARROW,
            out_channels=4,
            text_embed_dim=16,
            time_embed_dim=16,
            condition_dim=4,
            prior_vq_quantizer_codebook_size=32,
        ),
        lambda b: prompted_inputs(
            image_latent(b),
            prior_token_id=torch.arange(IMAGE_TOKENS).repeat(b, 1),
            prior_token_drop=torch.zeros(b, IMAGE_TOKENS, dtype=torch.bool),
            target_size=torch.full((b, 2), 64.0),
            crop_coords=torch.zeros(b, 2),
        ),
    ),
    Entry(
        "HiDreamImageTransformer2DModel",
        config_of(
            patch_size=2,
            in_channels=4,
            num_layers=3,
            num_single_layers=4,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_channels=[16, 16],
            text_emb_dim=16,
            num_routed_experts=0,  # dense: the routing reads the count of tokens of each expert
            axes_dims_rope=(4, 6, 6),
            max_resolution=(8, 8),
            llama_layers=[0, 1, 0, 1, 0, 1, 0],
        ),
        lambda b: call_inputs(
            hidden_states=image_latent(b),
            timesteps=at_time(b),
            encoder_hidden_states_t5=text_states(b),
            encoder_hidden_states_llama3=random_tensor(2, b, TEXT_TOKENS, 16, seed=3),
            pooled_embeds=pooled_text(b),
        ),
        timestep="timesteps",
    ),
    Entry(
        "HunyuanDiT2DModel",
        config_of(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            patch_size=2,
            sample_size=8,
            hidden_size=32,
            num_layers=6,
            mlp_ratio=2.0,
            cross_attention_dim=16,
            cross_attention_dim_t5=16,
            pooled_projection_dim=4,
            text_len=TEXT_TOKENS,
            text_len_t5=TEXT_TOKENS,
        ),
        lambda b: prompted_inputs(
            image_latent(b),
            text_embedding_mask=text_mask(b),
            encoder_hidden_states_t5=text_states(b, seed=2),
            text_embedding_mask_t5=text_mask(b),
            image_meta_size=torch.tensor([64.0, 64.0, 64.0, 64.0, 0.0, 0.0]).repeat(b, 1),
            style=torch.zeros(b, dtype=torch.long),
            image_rotary_emb=rotary_pair(IMAGE_TOKENS, 8),
        ),
    ),
    Entry(
        # With one prompt: how a second one is merged depends on the values of the masks.
        "HunyuanImageTransformer2DModel",
        config_of(HUNYUAN, patch_size=(2, 2), rope_axes_dim=(8, 8)),
        lambda b: prompted_inputs(image_latent(b), encoder_attention_mask=text_mask(b)),
    ),
    Entry(
        "Ideogram4Transformer2DModel",
        config_of(
            WIDE, intermediate_size=64, adaln_dim=8, llm_features_dim=16, mrope_section=(4, 2, 2)
        ),
        # One sequence: the prompt (role 3), then the image (role 2).
        lambda b: call_inputs(
            hidden_states=token_latent(b, TEXT_TOKENS + IMAGE_TOKENS),
            encoder_hidden_states=random_tensor(b, TEXT_TOKENS + IMAGE_TOKENS, 16, seed=1),
            timestep=at_time(b, 0.5),
            position_ids=torch.cat(
                [torch.arange(TEXT_TOKENS)[:, None].expand(-1, 3), grid_positions(1, 4, 4)]
            )
            .float()
            .repeat(b, 1, 1),
            segment_ids=torch.zeros(b, TEXT_TOKENS + IMAGE_TOKENS, dtype=torch.long),
            indicator=torch.tensor([3] * TEXT_TOKENS + [2] * IMAGE_TOKENS).repeat(b, 1),
        ),
    ),
    Entry(
        "Krea2Transformer2DModel",
        config_of(
            WIDE,
            num_key_value_heads=1,
            intermediate_size=64,
            timestep_embed_dim=16,
            text_hidden_dim=16,
            num_text_layers=3,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=32,
            axes_dims_rope=(4, 6, 6),
        ),
        lambda b: call_inputs(
            hidden_states=token_latent(b),
            encoder_hidden_states=random_tensor(b, TEXT_TOKENS, 3, 16, seed=1),
            encoder_attention_mask=text_mask(b),
            timestep=at_time(b, 0.5),
            position_ids=torch.cat([torch.zeros(TEXT_TOKENS, 3), grid_positions(1, 4, 4)]),
        ),
    ),
    Entry("LongCatImageTransformer2DModel", config_of(FLUX, pooled_projection_dim=16), flux_inputs),
    Entry(
        "LuminaNextDiT2DModel",
        config_of(
            sample_size=8,
            hidden_size=32,
            num_layers=4,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=16,
            cross_attention_dim=16,
        ),
        lambda b: prompted_inputs(
            image_latent(b),
            time=0.5,
            encoder_mask=text_mask(b),
            image_rotary_emb=torch.polar(
                torch.ones(IMAGE_TOKENS, 4), rotary_angles(IMAGE_TOKENS, 4)
            ).view(4, 4, 4),
            cross_attention_kwargs={},
        ),
    ),
    Entry(
        "NucleusMoEImageTransformer2DModel",
        config_of(
            in_channels=16,
            out_channels=4,
            num_layers=4,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
            mlp_ratio=6.0,
            dense_moe_strategy="leave_first_block_dense",
            num_experts=4,
            moe_intermediate_dim=16,
            capacity_factors=2.0,
        ),
        lambda b: prompted_inputs(
            token_latent(b, channels=16),
            time=0.5,
            encoder_hidden_states_mask=text_mask(b),
            img_shapes=[(1, 4, 4)] * b,
        ),
    ),
    Entry("OvisImageTransformer2DModel", config_of(FLUX, out_channels=4), flux_inputs),
    Entry(
        "PixArtTransformer2DModel",
        PIXART,
        lambda b: prompted_inputs(
            image_latent(b),
            encoder_attention_mask=text_mask(b),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ),
    ),
    Entry(
        "PRXTransformer2DModel",
        config_of(
            in_channels=4,
            context_in_dim=16,
            hidden_size=32,
            mlp_ratio=2.0,
            num_heads=2,
            depth=4,
            axes_dim=[8, 8],
        ),
        lambda b: prompted_inputs(image_latent(b), time=0.5, attention_mask=text_mask(b)),
    ),
    Entry(
        "QwenImageTransformer2DModel",
        config_of(
            in_channels=16,
            out_channels=4,
            num_layers=4,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
        ),
        lambda b: prompted_inputs(
            token_latent(b, channels=16),
            time=0.5,
            encoder_hidden_states_mask=text_mask(b),
            img_shapes=[[(1, 4, 4)]] * b,
        ),
    ),
    Entry(
        "SanaTransformer2DModel",
        config_of(
            NARROW,
            out_channels=4,
            num_cross_attention_heads=4,
            cross_attention_head_dim=8,
            cross_attention_dim=32,
            caption_channels=16,
            sample_size=8,
            patch_size=2,
        ),
        lambda b: prompted_inputs(image_latent(b), encoder_attention_mask=text_mask(b)),
    ),
    Entry(
        "SD3Transformer2DModel",
        config_of(
            NARROW,
            sample_size=8,
            joint_attention_dim=16,
            caption_projection_dim=32,
            pooled_projection_dim=16,
            out_channels=4,
            pos_embed_max_size=8,
            dual_attention_layers=(0, 1),
            qk_norm="rms_norm",
        ),
        lambda b: prompted_inputs(image_latent(b), pooled_projections=pooled_text(b)),
    ),
    Entry(
        "Transformer2DModel",
        PIXART,
        lambda b: prompted_inputs(
            image_latent(b),
            encoder_attention_mask=text_mask(b),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ),
    ),
    Entry(
        # The latent is a list with one [channels, frames, height, width] tensor per sample.
        "ZImageTransformer2DModel",
        config_of(
            in_channels=4,
            dim=32,
            n_layers=4,
            n_refiner_layers=2,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 6, 6],
            axes_lens=[64, 16, 16],
        ),
        lambda b: call_inputs(
            x=list(random_tensor(b, 4, 1, 8, 8)), t=at_time(b, 0.5), cap_feats=list(text_states(b))
        ),
        timestep="t",
        latent="x",
    ),
]
