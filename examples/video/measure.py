"""What a slimmer cache, and sparse attention in prefill, change for the small video model."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.omnisparse.selection import Choice
from ..smollm2.bench.attention import Attend, attention, dense, sparse
from ..smollm2.subject import Subject
from .games import PATCHES, make_video
from .model import QUESTION, Projector, answer_of

__all__ = ["FRAMES", "SCENES", "Answers", "answered"]

FRAMES, SCENES = 256, 3
SEEDS = range(100, 103)  # of recordings that the model was not trained on


@dataclass(frozen=True)
class Answers:
    """What was said of the videos; every token after the true ones before it.

    fewer_bytes: of the cache. right: share of the answers whose tokens are all right. agreement:
    share of the tokens that are the likeliest with a full cache and dense attention, too.
    """

    way: str
    fewer_bytes: float
    right: float
    agreement: float


@torch.no_grad()
def answered(
    subject: Subject,
    projector: Projector,
    videos: int,
    caches: Sequence[dict[str, Any]],
    prefills: Sequence[Choice],
    progress: Callable[[str], None] = print,
    frames: int = FRAMES,
) -> list[Answers]:
    """With a full cache, with each of these settings of SlimCache, and with sparse prefills."""
    from transformers import DynamicCache

    from ...compiler.models.slim_cache import SlimCache

    model, tokenizer, _ = subject
    embed = model.get_input_embeddings()
    question = tokenizer(QUESTION, return_tensors="pt").input_ids[0]
    start = len(projector.before)
    span = start, start + frames * PATCHES
    said: dict[str, list[Tensor]] = {}
    fewer: dict[str, list[float]] = {}
    answers = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(videos):
        video = make_video(frames, SCENES, SEEDS, generator)
        prompt = torch.cat([projector(video.patches), embed(question[:-1])])
        answer = answer_of(video.scenes, tokenizer)
        following = torch.cat([question[-1:], answer[:-1]])
        answers.append(answer)
        ways: list[tuple[str, Any, Attend]] = [("full", DynamicCache(config=model.config), dense)]
        ways += [
            (f"prefill with recall {choice.recall}, active {choice.active}",
             DynamicCache(config=model.config), sparse(choice))
            for choice in prefills
        ]  # fmt: skip
        for name, cache, attend in ways:
            with attention(model, attend):
                model.model(inputs_embeds=prompt[None], past_key_values=cache)
            said.setdefault(name, []).append(_likeliest(model, following, cache))
        for setting in caches:
            name = ", ".join(f"{key} {value}" for key, value in setting.items())
            slim = SlimCache(model, span=span, **setting)
            model.model(inputs_embeds=prompt[None], past_key_values=slim)
            said.setdefault(name, []).append(_likeliest(model, following, slim))
            fewer.setdefault(name, []).append(slim.full_nbytes / slim.nbytes)
        progress(f"video {len(answers)}: {tokenizer.decode(said['full'][-1])!r}")
    full, wanted = torch.cat(said["full"]), [each.tolist() for each in answers]
    return [
        Answers(
            way=name,
            fewer_bytes=statistics.mean(fewer.get(name, [1.0])),
            right=statistics.mean(
                one.tolist() == other for one, other in zip(own, wanted, strict=True)
            ),
            agreement=float((torch.cat(own) == full).float().mean()),
        )
        for name, own in said.items()
    ]


def _likeliest(model: Any, tokens: Tensor, cache: Any) -> Tensor:
    """The next token after each of these, which follow what the cache holds."""
    best: Tensor = model(tokens[None], past_key_values=cache).logits[0].argmax(-1)
    return best
