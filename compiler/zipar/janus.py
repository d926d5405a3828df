"""Janus speaks in text with one head and in pictures with another: here as one language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

__all__ = ["JanusPictures"]


class JanusPictures(nn.Module):
    """Janus as it generates pictures: tokens of text, and behind them, from `first` on, those of
    pictures, which alone are predicted."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.janus = model
        self.config = model.config
        self.first = int(model.config.get_text_config().vocab_size)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor,
        past_key_values: Any, use_cache: bool, logits_to_keep: int | Tensor,
    ) -> CausalLMOutput:  # fmt: skip
        """As causal language models of transformers have it."""
        code = input_ids - self.first
        text = self.janus.get_input_embeddings()(input_ids.clamp(max=self.first - 1))
        picture = self.janus.prepare_embeddings_for_image_generation(code.clamp(min=0))
        states = self.janus.model.language_model(
            inputs_embeds=torch.where((code >= 0)[..., None], picture, text),
            position_ids=position_ids, attention_mask=attention_mask,
            past_key_values=past_key_values, use_cache=use_cache,
        ).last_hidden_state  # fmt: skip
        if isinstance(logits_to_keep, Tensor):
            states = states[:, logits_to_keep]
        return CausalLMOutput(logits=self.janus.model.generation_head(states))
