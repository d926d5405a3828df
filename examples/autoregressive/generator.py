"""The generator: a Llama of transformers over the tokens of pictures, given the class.

A picture is a token of its class, then 16 rows of 16 codes, each with a token for its end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...compiler.extras import optional
from ..fashion.data import CLASSES
from .tokenizer import CODES, COLUMNS, ROWS

__all__ = ["CHECKPOINT", "END_OF_LINE", "NO_CLASS", "build", "codes_of", "load_generator",
           "prompt_of", "tokens_of"]  # fmt: skip

CHECKPOINT = Path(__file__).parent / "generator.safetensors"
END_OF_LINE = CODES
FIRST_CLASS = CODES + 1
NO_CLASS = FIRST_CLASS + len(CLASSES)  # for guidance: the class was left out in 1 of 10
VOCABULARY = NO_CLASS + 1


def build() -> Any:
    """An untrained one: 2.7 million weights."""
    transformers: Any = optional("transformers", "transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=192, intermediate_size=512, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=NO_CLASS,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def load_generator() -> Any:
    """The trained one."""
    network = build()
    weights = optional("safetensors.torch", "examples").load_file(CHECKPOINT)
    network.load_state_dict({name: each.float() for name, each in weights.items()}, strict=False)
    network.tie_weights()
    return network.eval()


def prompt_of(labels: Tensor | None, batch: int = 1) -> Tensor:
    """What a picture of each class [batch] begins with, int64 [batch, 1]; None: of no class."""
    if labels is None:
        return torch.full((batch, 1), NO_CLASS)
    return FIRST_CLASS + labels[:, None]


def tokens_of(codes: Tensor) -> Tensor:
    """Codes [batch, ROWS, COLUMNS] with the end of each row: [batch, ROWS * (COLUMNS + 1)]."""
    return torch.nn.functional.pad(codes, (0, 1), value=END_OF_LINE).flatten(1)


def codes_of(tokens: Tensor) -> Tensor:
    """The codes among a picture's tokens, without its prompt."""
    return tokens.unflatten(1, (ROWS, COLUMNS + 1))[:, :, :-1]
