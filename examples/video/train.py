r"""Train the projector before frozen SmolLM2, on short videos and then on longer ones.

    python -m accel.examples.video.train --steps 500
    python -m accel.examples.video.train --steps 100 --rate 1e-3 --longest 256 --seed 1 --resume
    python -m accel.examples.video.train --steps 70 --rate 1e-3 --shortest 96 --longest 256 \
        --seed 2 --resume
    python -m accel.examples.video.train --steps 220 --rate 1e-3 --shortest 128 --longest 256 \
        --seed 3 --resume

Two and a half hours on 2 CPU cores. Writes projector.safetensors (fp16) and training.csv beside
this file; each call's steps count from 0. The committed weights had 460 of the first 500 steps,
which other work on the machine made slow, and the first three calls trained on 4 recordings of
each game.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..smollm2.subject import load
from .games import Video, make_video
from .model import QUESTION, Projector, answer_of, load_projector

HERE = Path(__file__).parent
SEEDS = range(12)  # of the recordings to train on; others are for tests
MOST = 3  # scenes
IGNORED = -100


def loss_of(
    model: Any, projector: Projector, tokenizer: Any, videos: Sequence[Video]
) -> tuple[Tensor, float]:
    """Mean negative log-probability of the answers' tokens, and how many are the likeliest."""
    question = tokenizer(QUESTION, return_tensors="pt").input_ids[0]
    embed, rows, targets = model.get_input_embeddings(), [], []
    for video in videos:
        answer = answer_of(video.scenes, tokenizer)
        words = embed(torch.cat([question, answer]))
        rows.append(torch.cat([projector(video.patches), words])[:-1])
        targets.append(torch.full((len(rows[-1]),), IGNORED).index_copy(
            0, torch.arange(len(rows[-1]) - len(answer), len(rows[-1])), answer))  # fmt: skip
    # Behind its last token no row is read, so that causal attention needs no mask for padding.
    target = pad_sequence(targets, batch_first=True, padding_value=IGNORED)
    states = model.model(inputs_embeds=pad_sequence(rows, batch_first=True), use_cache=False)
    asked = target != IGNORED
    logits, wanted = model.lm_head(states.last_hidden_state[asked]), target[asked]
    right = float((logits.argmax(-1) == wanted).float().mean())
    return torch.nn.functional.cross_entropy(logits, wanted), right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shortest", type=int, default=24, help="frames of a video")
    parser.add_argument("--longest", type=int, default=24)
    parser.add_argument("--resume", action="store_true", help="go on from the written weights")
    parser.add_argument("--output", type=Path, default=HERE)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    model, tokenizer, _ = load()
    model.requires_grad_(False)
    projector = load_projector().train() if arguments.resume else Projector()
    optimizer = torch.optim.AdamW(projector.parameters(), lr=arguments.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, arguments.rate, total_steps=arguments.steps, pct_start=0.1
    )
    generator = torch.Generator().manual_seed(arguments.seed)
    record = arguments.output / "training.csv"
    log = record.read_text().splitlines() if arguments.resume else ["step,seconds,loss,right"]
    started, losses, rights = time.time(), 0.0, 0.0
    for step in range(1, arguments.steps + 1):
        counts = torch.randint(1, MOST + 1, (arguments.batch,), generator=generator).tolist()
        longer = float(torch.rand((), generator=generator))
        frames = round(arguments.shortest * (arguments.longest / arguments.shortest) ** longer)
        videos = [make_video(frames, count, SEEDS, generator) for count in counts]
        loss, right = loss_of(model, projector, tokenizer, videos)
        loss.backward()
        losses, rights = losses + float(loss.detach()), rights + right
        torch.nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0:
            passed = time.time() - started
            log.append(f"{step},{passed:.0f},{losses / 10:.4f},{rights / 10:.4f}")
            print(log[-1], flush=True)
            losses = rights = 0.0
            weights = {name: each.half() for name, each in projector.state_dict().items()}
            save_file(weights, arguments.output / "projector.safetensors")
            record.write_text("\n".join(log) + "\n")


if __name__ == "__main__":
    main()
