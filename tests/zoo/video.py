"""Transformers that make videos, some with sound."""

from __future__ import annotations

from typing import Any

import torch

from .parts import (
    COGVIDEOX,
    HUNYUAN,
    IMAGE_TOKENS,
    LTX2,
    PIXART,
    TEXT_TOKENS,
    WAN,
    WIDE,
    Entry,
    allegro_rotary,
    at_time,
    call_inputs,
    camera_inputs,
    config_of,
    grid_positions,
    pooled_text,
    prompted_inputs,
    random_tensor,
    rotary_pair,
    text_mask,
    text_states,
    token_latent,
    video_latent,
    wan_inputs,
)

VIDEO: list[Entry] = [
    Entry(
        "AllegroTransformer3DModel",
        config_of(
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=4,
            cross_attention_dim=24,
            sample_height=8,
            sample_width=8,
            sample_frames=2,
            caption_channels=16,
        ),
        lambda b: prompted_inputs(
            video_latent(b), encoder_attention_mask=text_mask(b), image_rotary_emb=allegro_rotary()
        ),
    ),
    Entry(
        "AnyFlowTransformer3DModel",
        WAN,
        # The timestep has one value per frame; the frames come before the channels.
        lambda b: call_inputs(
            hidden_states=random_tensor(b, 2, 4, 8, 8),
            encoder_hidden_states=text_states(b),
            timestep=torch.full((b, 2), 500.0),
            r_timestep=torch.full((b, 2), 250.0),
        ),
    ),
    Entry(
        # Two chunks of one frame: the first one compressed, the second one in full. The block mask
        # is built outside of the graph, as diffusers asks for.
        "AnyFlowFARTransformer3DModel",
        config_of(WAN, chunk_partition=(1, 1), full_chunk_limit=1),
        lambda b: call_inputs(
            hidden_states=random_tensor(b, 2, 4, 8, 8),
            encoder_hidden_states=text_states(b),
            timestep=torch.full((b, 2), 500.0),
            r_timestep=torch.full((b, 2), 250.0),
            chunk_partition=[1, 1],
            attention_mask=far_mask(),
        ),
    ),
    Entry(
        "ChronoEditTransformer3DModel",
        config_of(WAN, image_dim=16, added_kv_proj_dim=24, rope_temporal_skip_len=2),
        # The cross-attention takes the last 512 tokens as the prompt, the rest as the image.
        lambda b: wan_inputs(b, text=512, encoder_hidden_states_image=text_states(b, seed=2)),
    ),
    Entry(
        "CogVideoXTransformer3DModel",
        config_of(COGVIDEOX, use_rotary_positional_embeddings=True),
        lambda b: prompted_inputs(
            random_tensor(b, 2, 4, 8, 8), image_rotary_emb=rotary_pair(2 * IMAGE_TOKENS, 16)
        ),
    ),
    Entry(
        "ConsisIDTransformer3DModel",
        config_of(
            COGVIDEOX,
            attention_head_dim=24,
            is_train_face=True,
            cross_attn_dim_head=8,
            cross_attn_num_heads=2,
            LFE_id_dim=4,
            LFE_vit_dim=4,
            LFE_depth=5,
            LFE_dim_head=4,
            LFE_num_heads=2,
            LFE_num_id_token=2,
            LFE_num_querie=2,
            LFE_output_dim=32,
            LFE_ff_mult=2,
        ),
        lambda b: prompted_inputs(
            random_tensor(b, 2, 4, 8, 8),
            id_cond=random_tensor(b, 4, seed=2),
            id_vit_hidden=[random_tensor(b, 3, 4, seed=10 + scale) for scale in range(5)],
        ),
    ),
    Entry(
        "CosmosTransformer3DModel",
        config_of(
            WIDE,
            out_channels=4,
            mlp_ratio=2.0,
            text_embed_dim=16,
            adaln_lora_dim=4,
            max_size=(4, 8, 8),
            concat_padding_mask=False,  # it needs torchvision
        ),
        lambda b: prompted_inputs(video_latent(b), time=0.5),
    ),
    Entry(
        # The samples are packed into one sequence: the prompt, then one video per sample. The
        # latent is a list with one tensor per sample, and each token of a video has its timestep.
        "Cosmos3OmniTransformer",
        config_of(
            head_dim=16,
            hidden_size=32,
            intermediate_size=64,
            latent_channel=4,
            num_attention_heads=2,
            num_hidden_layers=4,
            num_key_value_heads=1,
            patch_latent_dim=16,
            rope_axes_dim=(4, 2, 2),
            vocab_size=32,
        ),
        lambda b: call_inputs(
            input_ids=torch.arange(TEXT_TOKENS),
            text_indexes=torch.arange(TEXT_TOKENS),
            position_ids=torch.cat([torch.zeros(TEXT_TOKENS, 3), grid_positions(b, 4, 4)]).T,
            und_len=TEXT_TOKENS,
            sequence_length=TEXT_TOKENS + IMAGE_TOKENS * b,
            vision_tokens=list(random_tensor(b, 1, 4, 1, 8, 8)),
            vision_token_shapes=[(1, 4, 4)] * b,
            vision_sequence_indexes=torch.arange(IMAGE_TOKENS * b) + TEXT_TOKENS,
            vision_mse_loss_indexes=torch.arange(IMAGE_TOKENS * b) + TEXT_TOKENS,
            vision_timesteps=at_time(IMAGE_TOKENS * b),
            vision_noisy_frame_indexes=[torch.tensor([0])] * b,
        ),
        timestep="vision_timesteps",
        latent="vision_tokens",
    ),
    Entry(
        "EasyAnimateTransformer3DModel",
        config_of(
            WIDE,
            out_channels=4,
            patch_size=2,
            sample_width=8,
            sample_height=8,
            mmdit_layers=3,
            time_embed_dim=16,
            text_embed_dim=16,
        ),
        lambda b: prompted_inputs(video_latent(b)),
    ),
    Entry(
        "HeliosTransformer3DModel",
        config_of(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=32,
            num_layers=4,
            rope_dim=(4, 4, 4),
        ),
        lambda b: wan_inputs(
            b,
            indices_hidden_states=torch.arange(7, 9).repeat(b, 1),
            indices_latents_history_short=torch.arange(6, 7).repeat(b, 1),
            indices_latents_history_mid=torch.arange(4, 6).repeat(b, 1),
            indices_latents_history_long=torch.arange(0, 4).repeat(b, 1),
            latents_history_short=random_tensor(b, 4, 1, 8, 8, seed=2),
            latents_history_mid=random_tensor(b, 4, 2, 8, 8, seed=3),
            latents_history_long=random_tensor(b, 4, 4, 8, 8, seed=4),
        ),
    ),
    Entry(
        "HunyuanVideoTransformer3DModel",
        config_of(HUNYUAN, pooled_projection_dim=16, rope_axes_dim=(4, 6, 6)),
        lambda b: prompted_inputs(
            video_latent(b),
            encoder_attention_mask=text_mask(b),
            pooled_projections=pooled_text(b),
            guidance=at_time(b, 6000.0),
        ),
    ),
    Entry(
        "HunyuanVideoFramepackTransformer3DModel",
        config_of(
            HUNYUAN,
            pooled_projection_dim=16,
            rope_axes_dim=(4, 6, 6),
            has_image_proj=True,
            image_proj_dim=16,
            has_clean_x_embedder=True,
        ),
        lambda b: prompted_inputs(
            video_latent(b),
            encoder_attention_mask=text_mask(b),
            pooled_projections=pooled_text(b),
            image_embeds=text_states(b, seed=3),
            indices_latents=torch.arange(7, 9),
            guidance=at_time(b, 6000.0),
            latents_clean=random_tensor(b, 4, 2, 8, 8, seed=4),
            indices_latents_clean=torch.arange(0, 2),
            latents_history_2x=random_tensor(b, 4, 2, 8, 8, seed=5),
            indices_latents_history_2x=torch.arange(5, 7),
            latents_history_4x=random_tensor(b, 4, 4, 8, 8, seed=6),
            indices_latents_history_4x=torch.arange(1, 5),
        ),
    ),
    Entry(
        "JoyImageEditTransformer3DModel",
        config_of(
            patch_size=[1, 2, 2],
            in_channels=4,
            hidden_size=32,
            num_attention_heads=2,
            text_dim=16,
            mlp_width_ratio=2.0,
            num_layers=4,
            rope_dim_list=[4, 6, 6],
        ),
        lambda b: prompted_inputs(video_latent(b, frames=1)),
    ),
    Entry(
        "JoyImageEditPlusTransformer3DModel",
        config_of(
            patch_size=[1, 2, 2],
            in_channels=4,
            hidden_size=32,
            num_attention_heads=2,
            text_dim=16,
            mlp_width_ratio=2.0,
            num_layers=4,
            rope_dim_list=[4, 6, 6],
        ),
        # The latent arrives as patches: the noisy image, then one reference image.
        lambda b: prompted_inputs(
            random_tensor(b, 2 * IMAGE_TOKENS, 4, 1, 2, 2),
            encoder_hidden_states_mask=text_mask(b).float(),
            shape_list=[[(1, 4, 4), (1, 4, 4)]] * b,
        ),
    ),
    Entry(
        "Kandinsky5Transformer3DModel",
        config_of(
            in_text_dim=16,
            in_text_dim2=16,
            time_dim=16,
            model_dim=32,
            ff_dim=64,
            num_text_blocks=2,
            num_visual_blocks=4,
            axes_dims=(4, 6, 6),
        ),
        lambda b: prompted_inputs(
            random_tensor(b, 2, 8, 8, 4),
            pooled_projections=pooled_text(b),
            visual_rope_pos=(torch.arange(2), torch.arange(4), torch.arange(4)),
            text_rope_pos=torch.arange(TEXT_TOKENS),
        ),
    ),
    Entry(
        "Kandinsky6Transformer3DModel",
        config_of(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=16,
            in_text_dim2=16,
            time_dim=16,
            model_dim=32,
            ff_dim=64,
            num_text_blocks=2,
            num_visual_blocks=4,
            axes_dims=(4, 6, 6),
            visual_cond=False,
            in_audio_dim=4,
            out_audio_dim=4,
        ),
        lambda b: prompted_inputs(
            random_tensor(b, 2, 8, 8, 4),
            audio_hidden_states=random_tensor(b, 5, 4, seed=3),
            pooled_projections=pooled_text(b),
        ),
    ),
    Entry(
        # Its sparse attention is flex attention, which has no backward pass on CPU.
        "Kandinsky6SRTransformer3DModel",
        config_of(
            in_visual_dim=4,
            out_visual_dim=4,
            time_dim=16,
            model_dim=32,
            ff_dim=64,
            num_visual_blocks=4,
            axes_dims=(4, 6, 6),
        ),
        # The latent comes with a conditioning video and its mask: 2 * 4 + 1 channels.
        lambda b: call_inputs(hidden_states=random_tensor(b, 2, 8, 8, 9), timestep=at_time(b)),
    ),
    Entry(
        "LatteTransformer3DModel",
        config_of(PIXART, video_length=2),
        lambda b: prompted_inputs(video_latent(b)),
    ),
    Entry(
        "LTX2VideoTransformer3DModel",
        LTX2,
        lambda b: prompted_inputs(
            token_latent(b, 2 * IMAGE_TOKENS),
            audio_hidden_states=random_tensor(b, 5, 4, seed=3),
            audio_encoder_hidden_states=text_states(b, seed=2),
            encoder_attention_mask=text_mask(b),
            audio_encoder_attention_mask=text_mask(b),
            num_frames=2,
            height=4,
            width=4,
            audio_num_frames=5,
        ),
    ),
    Entry(
        "LTXVideoTransformer3DModel",
        config_of(WIDE, out_channels=4, cross_attention_dim=32, caption_channels=16),
        lambda b: prompted_inputs(
            token_latent(b, 2 * IMAGE_TOKENS),
            encoder_attention_mask=text_mask(b),
            num_frames=2,
            height=4,
            width=4,
        ),
    ),
    Entry(
        # The timestep has one value per noise level, whatever the batch: the video and the audio
        # are at the first level, the prompt at the second.
        "MiniMaxH3Transformer3DModel",
        config_of(
            WIDE,
            hidden_size=32,
            ffn_dim=64,
            audio_in_channels=4,
            text_dim=16,
            freq_dim=16,
            time_embed_hidden_dim=16,
            time_embed_dim=16,
            rope_freq_dim=2,
        ),
        lambda b: call_inputs(
            hidden_states=token_latent(b, channels=16),
            audio_hidden_states=random_tensor(b, 4, 4, seed=3),
            encoder_hidden_states=text_states(b),
            timestep=torch.tensor([500.0, 0.0]),
            timestep_indices=torch.tensor([1] * TEXT_TOKENS + [0] * (IMAGE_TOKENS + 4)),
            token_tags=torch.tensor([0] * TEXT_TOKENS + [1] * IMAGE_TOKENS + [2] * 4),
            position_ids=torch.cat(
                [torch.zeros(TEXT_TOKENS, 3), grid_positions(1, 4, 4), grid_positions(4, 1, 1)]
            ),
            text_indices=torch.arange(TEXT_TOKENS),
            video_indices=torch.arange(TEXT_TOKENS, TEXT_TOKENS + IMAGE_TOKENS),
            audio_indices=torch.arange(TEXT_TOKENS + IMAGE_TOKENS, TEXT_TOKENS + IMAGE_TOKENS + 4),
        ),
    ),
    Entry(
        "MochiTransformer3DModel",
        config_of(
            WIDE,
            pooled_projection_dim=16,
            text_embed_dim=16,
            time_embed_dim=8,
            max_sequence_length=TEXT_TOKENS,
        ),
        lambda b: prompted_inputs(video_latent(b), encoder_attention_mask=text_mask(b)),
    ),
    Entry(
        "MotifVideoTransformer3DModel",
        config_of(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=3,
            num_single_layers=6,
            num_decoder_layers=3,
            mlp_ratio=2.0,
            text_embed_dim=16,
            rope_axes_dim=(4, 6, 6),
            enable_text_cross_attention_dual=True,
            enable_text_cross_attention_single=True,
        ),
        lambda b: prompted_inputs(video_latent(b), encoder_attention_mask=text_mask(b)),
    ),
    Entry(
        "SanaVideoTransformer3DModel",
        config_of(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=16,
            sample_size=8,
            rope_max_seq_len=32,
        ),
        lambda b: prompted_inputs(video_latent(b), encoder_attention_mask=text_mask(b)),
    ),
    Entry(
        # The timestep has one value per frame.
        "SanaWMTransformer3DModel",
        config_of(
            in_channels=4,
            num_layers=4,
            hidden_size=48,
            num_attention_heads=2,
            softmax_every_n=2,
            linear_head_dim=24,
            chunk_plucker_channels=4,
            chunk_plucker_post_attn_blocks=4,
            caption_channels=16,
            image_size=64,
        ),
        lambda b: call_inputs(
            hidden_states=random_tensor(b, 4, 2, 4, 4),
            encoder_hidden_states=random_tensor(b, 1, TEXT_TOKENS, 16, seed=1),
            encoder_attention_mask=text_mask(b)[:, None, None],
            timestep=torch.full((b, 1, 2), 500.0),
            camera_conditions=camera_inputs(b),
            chunk_plucker=random_tensor(b, 4, 2, 4, 4, seed=2),
        ),
    ),
    Entry(
        "SanaWMLTX2RefinerTransformer3DModel",
        LTX2,
        lambda b: prompted_inputs(
            token_latent(b, 2 * IMAGE_TOKENS),
            encoder_attention_mask=text_mask(b),
            video_rotary_emb=rotary_pair(2 * IMAGE_TOKENS, 32),
        ),
    ),
    Entry("SkyReelsV2Transformer3DModel", WAN, wan_inputs),
    Entry("WanTransformer3DModel", WAN, wan_inputs),
    Entry(
        "WanAnimateTransformer3DModel",
        config_of(
            WAN,
            in_channels=12,
            latent_channels=4,
            image_dim=16,
            added_kv_proj_dim=24,
            motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
            motion_encoder_size=16,
            motion_style_dim=8,
            motion_dim=4,
            motion_encoder_dim=8,
            face_encoder_hidden_dim=16,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=2,
        ),
        lambda b: wan_inputs(
            b,
            frames=3,
            channels=12,
            text=512,
            encoder_hidden_states_image=text_states(b, seed=2),
            pose_hidden_states=random_tensor(b, 4, 2, 8, 8, seed=3),
            face_pixel_values=random_tensor(b, 3, 8, 16, 16, seed=4),
        ),
    ),
    Entry(
        "WanVACETransformer3DModel",
        config_of(WAN, vace_layers=[0, 2], vace_in_channels=8),
        lambda b: wan_inputs(b, control_hidden_states=random_tensor(b, 8, 2, 8, 8, seed=2)),
    ),
]


def far_mask() -> Any:
    """The block mask of AnyFlow-FAR for its two chunks of one frame each."""
    (entry,) = [each for each in VIDEO if each.class_name == "AnyFlowFARTransformer3DModel"]
    model: Any = entry.build()
    # By default torch 2.14 makes it on the GPU that it was built for.
    cpu = torch.device("cpu")
    return model.build_attention_mask(chunk_partition=[1, 1], height=8, width=8, device=cpu)
