"""Janus speaks in text with one head and in pictures with another: here as one language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from ....kernels.errors import OptionError
from ....passes.zipar.raster import Raster
from .names import cache_name

__all__ = ["JanusPictures", "check_grid"]


def check_grid(model: Any, raster: Raster) -> None:
    """Raise OptionError for a model that is not Janus, and for pictures of another size than its
    own: it was trained for one grid of codes, and its decoder of pictures takes no other."""
    name = type(model).__name__
    if not hasattr(model, "prepare_embeddings_for_image_generation"):
        raise OptionError(
            f"{name} is not Janus; call model.generate(..., custom_generate=zipar) instead"
        )
    rows, columns = model.model.vqmodel.quantize.quant_state_dims
    made = model.model.vision_model.config.num_image_tokens
    if (raster.rows, raster.columns) != (rows, columns):
        raise OptionError(
            f"a picture of {raster.rows} by {raster.columns} codes, but {name} makes and decodes "
            f"{rows} by {columns}; make a ZipAR of these"
        )
    if made != raster.tokens:
        raise OptionError(
            f"{name} makes {made} codes of a picture, but its decoder takes {rows} by {columns}; "
            "its configuration contradicts itself (num_image_tokens, num_patches)"
        )


class JanusPictures(nn.Module):
    """Janus as it generates pictures: tokens of text, and behind them, from `first` on, those of
    pictures, which alone are predicted."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.janus = model
        self.config = model.config
        self.first = int(model.config.get_text_config().vocab_size)
        self.cache = cache_name(model.model.language_model)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor,
        use_cache: bool, logits_to_keep: int | Tensor, cache: Any,
    ) -> CausalLMOutput:  # fmt: skip
        """As causal language models of transformers have it."""
        code = input_ids - self.first
        text = self.janus.get_input_embeddings()(input_ids.clamp(max=self.first - 1))
        picture = self.janus.prepare_embeddings_for_image_generation(code.clamp(min=0))
        states = self.janus.model.language_model(
            inputs_embeds=torch.where((code >= 0)[..., None], picture, text),
            position_ids=position_ids, attention_mask=attention_mask, use_cache=use_cache,
            **{self.cache: cache},
        ).last_hidden_state  # fmt: skip
        if isinstance(logits_to_keep, Tensor):
            states = states[:, logits_to_keep]
        return CausalLMOutput(logits=self.janus.model.generation_head(states))
