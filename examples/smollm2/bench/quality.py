"""What sparse attention in prefill costs: perplexity, agreement, and finding needles."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..subject import FIRST, Subject
from .attention import Attend, attention

__all__ = ["Quality", "compare", "log_probabilities", "needles"]

AT_ONCE = 1024  # tokens whose logits are held
CITIES = (
    "Lisbon", "Nairobi", "Toronto", "Jakarta", "Warsaw", "Santiago", "Helsinki", "Manila",
)  # fmt: skip
QUESTION = "\nQuestion: What is the secret number of {}?\nAnswer: The secret number of {} is"


@dataclass(frozen=True)
class Quality:
    """Against dense attention on the same tokens.

    perplexity: of the text. change: relative. divergence: Kullback-Leibler, nats a token.
    agreement: share of the positions with the same most likely next token.
    """

    perplexity: float
    change: float
    divergence: float
    agreement: float


@torch.no_grad()
def log_probabilities(model: Any, tokens: Tensor, attend: Attend) -> Tensor:
    """Of every next token at every position: [N, vocabulary]."""
    with attention(model, attend):
        states = model.model(tokens[None], use_cache=False).last_hidden_state[0]
    parts = (model.lm_head(part).log_softmax(-1) for part in states.split(AT_ONCE))
    return torch.cat(list(parts))


def compare(got: Tensor, wanted: Tensor, tokens: Tensor) -> Quality:
    """Log-probabilities of a text by sparse and by dense attention."""
    target = tokens[1:, None]
    loss, full = (-float(each[:-1].gather(1, target).mean()) for each in (got, wanted))
    parts = zip(got.split(AT_ONCE), wanted.split(AT_ONCE), strict=True)
    divergence = sum(float((q.exp() * (q - p)).sum()) for p, q in parts)
    agreement = float((got.argmax(-1) == wanted.argmax(-1)).float().mean())
    change = math.exp(loss - full) - 1
    return Quality(math.exp(loss), change, divergence / len(got), agreement)


@torch.no_grad()
def needles(subject: Subject, length: int, attend: Attend, contexts: int) -> tuple[int, float]:
    """How many of the numbers that are hidden in the text are found, of 8 in each context; and the
    mean log-probability of their digits.

    Only the text is read by `attend`: the questions that follow see all that it left in the cache.
    """
    from transformers import DynamicCache

    model, tokenizer, text = subject
    found, total, asked = 0, 0.0, 0
    for context in range(contexts):
        generator = random.Random(context)
        numbers = {city: generator.randint(10_000, 99_999) for city in CITIES}
        pieces = text[FIRST + context * length :].split(length // len(CITIES) - 24)
        parts = []
        for piece, (city, number) in zip(pieces, numbers.items(), strict=False):
            needle = f"\nThe secret number of {city} is {number}.\n"
            parts += [piece, tokenizer(needle, return_tensors="pt").input_ids[0]]
        prompt = torch.cat(parts)
        cache = DynamicCache(config=model.config)
        with attention(model, attend):
            model.model(prompt[None], past_key_values=cache)
        for city, number in numbers.items():
            question = tokenizer(QUESTION.format(city, city), return_tensors="pt").input_ids
            answer = tokenizer(f" {number}", return_tensors="pt").input_ids
            both = torch.cat([question, answer], 1)
            logits = model(both, past_key_values=cache).logits[0, question.shape[1] - 1 : -1]
            cache.crop(-both.shape[1])
            found += int((logits.argmax(-1) == answer[0]).all())
            chosen = logits.log_softmax(-1).gather(1, answer[0, :, None])
            total, asked = total + float(chosen.sum()), asked + answer.shape[1]
    return found, total / asked
