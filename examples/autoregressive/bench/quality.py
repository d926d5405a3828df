"""What fewer passes cost: pictures under the sequential model, a classifier, and a distance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....compiler.models.zipar import ZipAR
from ...fashion import classifier, data
from ...fashion.measure import agreement
from ..generator import END_OF_LINE, codes_of, prompt_of, tokens_of
from ..tokenizer import CODES, COLUMNS, ROWS, Tokenizer
from ..train_generator import nats

__all__ = ["Quality", "decode", "of_pictures", "real"]

BATCH = 100


@dataclass(frozen=True)
class Quality:
    """Of the pictures that one way of decoding gives.

    passes: mean. nats: mean negative log-likelihood of a code under the model, given all before it
    in raster order. agreement: share that the classifier takes for the class asked for. distance:
    Fréchet distance of the classifier's features to those of real test pictures.
    """

    way: str
    temperature: float
    passes: float
    nats: float
    agreement: float
    distance: float


@torch.no_grad()
def decode(model: Any, zipar: ZipAR, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Tokens of a picture of each class, int64 [B, tokens], and the passes of each."""
    prompts = prompt_of(labels)
    whole = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), custom_generate=zipar, do_sample=True,
        temperature=temperature, top_k=0, max_new_tokens=zipar.raster.tokens,
    )  # fmt: skip
    assert zipar.passes is not None
    return whole[:, 1:], zipar.passes


@torch.no_grad()
def of_pictures(
    model: Any, tokenizer: Tokenizer, way: str, kind: Callable[..., ZipAR],
    settings: dict[str, Any], temperature: float, pictures: int, seed: int = 0,
) -> Quality:  # fmt: skip
    """Decode as many pictures, of all classes in turn, and measure them."""
    zipar = kind(ROWS, COLUMNS, end_of_line=END_OF_LINE, allowed=range(CODES), unroll=1, **settings)
    torch.manual_seed(seed)
    labels = torch.arange(pictures) % len(data.CLASSES)
    found = [decode(model, zipar, some, temperature) for some in labels.split(BATCH)]
    tokens, passes = (torch.cat(each) for each in zip(*found, strict=True))
    return _measured(model, tokenizer, way, temperature, tokens, labels, passes)


@torch.no_grad()
def real(model: Any, tokenizer: Tokenizer, pictures: int) -> Quality:
    """Held-out pictures, after the tokenizer: what the model would have to reach."""
    images, labels = (each[:pictures] for each in data.load("test"))
    tokens = torch.cat([tokens_of(tokenizer.encode(some)) for some in images.split(BATCH)])
    return _measured(model, tokenizer, "real pictures", 1.0, tokens, labels, torch.zeros(1))


def _measured(
    model: Any, tokenizer: Tokenizer, way: str, temperature: float, tokens: Tensor,
    labels: Tensor, passes: Tensor,
) -> Quality:  # fmt: skip
    judge = classifier.load()
    parts = list(zip(prompt_of(labels).split(BATCH), tokens.split(BATCH), strict=True))
    likelihood = [float(nats(model, *part)) * len(part[0]) for part in parts]
    codes: Sequence[Tensor] = codes_of(tokens).split(BATCH)
    pictures = torch.cat([tokenizer.decode(some) for some in codes]).clamp(-1, 1)
    return Quality(
        way=way,
        temperature=temperature,
        passes=float(passes.float().mean()),
        nats=sum(likelihood) / len(tokens),
        agreement=agreement(judge, pictures, labels),
        distance=judge.frechet_distance(pictures),
    )
