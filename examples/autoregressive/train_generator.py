r"""Train the generator on the tokens of Fashion-MNIST. About an hour on 2 CPU cores.

    python -m accel.examples.autoregressive.train_generator --steps 1500

Writes generator.safetensors (fp16) and generator_training.csv beside this file; each call's steps
count from 0. The committed weights had 250 steps by Muon, whose bfloat16 is slow on a CPU (5 of 7
seconds a step), and go on from there with

    python -m accel.examples.autoregressive.train_generator --steps 420 --rate 2e-3 --seed 1 \
        --resume
    python -m accel.examples.autoregressive.train_generator --steps 1000 --rate 2e-3 --seed 2 \
        --windows 0.5 --resume

With --windows it learns to do with what ZipAR leaves to see: as many of the pictures are seen
through a random window. Without, all but the second row are decoded well; that one never was seen
below an unfinished row.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ...passes.zipar.raster import Raster
from ..fashion import data
from .generator import END_OF_LINE, build, load_generator, prompt_of, tokens_of
from .tokenizer import COLUMNS, ROWS, load_tokenizer

HERE = Path(__file__).parent
DROPPED = 0.1  # of the classes
WINDOWS = range(1, 9)  # that pictures are seen through


def seen(window: int) -> Tensor:
    """What each token sees when a picture is decoded with this window, float [1, S, S] to be added
    to scores; S: the prompt and all tokens but the last."""
    raster = Raster(ROWS, COLUMNS, window, end_of_line=True)
    number = torch.zeros(raster.tokens, dtype=torch.long)  # the pass in which each token enters
    for count, entries in enumerate(raster.passes):
        for entry in entries:
            number[entry.slot + 1] = count
    hidden = torch.ones(raster.tokens, raster.tokens).triu(1).bool() | (number > number[:, None])
    return torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)[None]


def nats(model: Any, prompt: Tensor, tokens: Tensor, window: int = COLUMNS) -> Tensor:
    """Mean negative log-likelihood of the codes among a picture's tokens."""
    mask = seen(window).expand(len(tokens), 1, -1, -1)
    inputs = torch.cat([prompt, tokens[:, :-1]], 1)
    logits = model(inputs, attention_mask=mask, use_cache=False).logits
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    return losses[tokens != END_OF_LINE].mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--windows", type=float, default=0.0, help="share seen through a window")
    parser.add_argument("--resume", action="store_true", help="go on from the written weights")
    parser.add_argument("--output", type=Path, default=HERE)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    tokenizer = load_tokenizer()
    images, labels = data.load("train")
    with torch.no_grad():
        tested, tested_labels = (each[:500] for each in data.load("test"))
        held_out = tokens_of(tokenizer.encode(tested)), prompt_of(tested_labels)
    network = (load_generator() if arguments.resume else build()).train()
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=arguments.rate, weight_decay=0.01, betas=(0.9, 0.95)
    )
    compiled = torch.compile(network)
    generator = torch.Generator().manual_seed(arguments.seed)
    record = arguments.output / "generator_training.csv"
    log = record.read_text().splitlines() if arguments.resume else []
    log.append(
        f"# seed {arguments.seed}, batch {arguments.batch}, rate {arguments.rate}, "
        f"windows {arguments.windows}"
    )
    log.append("step,seconds,nats,held_out_nats,held_out_nats_window_3")
    masks = torch.stack([seen(each) for each in (*WINDOWS, COLUMNS)])
    started, running = time.time(), 0.0
    for step in range(1, arguments.steps + 1):
        chosen = torch.randint(len(images), (arguments.batch,), generator=generator)
        prompt = prompt_of(labels[chosen])
        left_out = torch.rand(arguments.batch, generator=generator) < DROPPED
        prompt[left_out] = prompt_of(None, int(left_out.sum()))
        with torch.no_grad():
            tokens = tokens_of(tokenizer.encode(images[chosen]))
        window = torch.randint(len(WINDOWS), (arguments.batch,), generator=generator)
        window[torch.rand(arguments.batch, generator=generator) >= arguments.windows] = -1
        inputs = torch.cat([prompt, tokens[:, :-1]], 1)
        logits = compiled(inputs, attention_mask=masks[window], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        rest = (arguments.steps - step + 1) / (0.4 * arguments.steps)
        optimizer.param_groups[0]["lr"] = arguments.rate * min(1.0, step / 50, rest)
        optimizer.step()
        optimizer.zero_grad()
        running += float(loss.detach())
        if not math.isfinite(running):
            raise RuntimeError(f"the loss is not finite at step {step}: lower --rate")
        if step % 50 == 0 or step == arguments.steps:
            with torch.no_grad():
                parts = list(zip(held_out[1].split(50), held_out[0].split(50), strict=True))
                measured, through = (
                    sum(float(nats(network.eval(), *part, each)) for part in parts) / len(parts)
                    for each in (COLUMNS, 3)
                )
            network.train()
            passed = time.time() - started
            log.append(
                f"{step},{passed:.0f},{running / ((step - 1) % 50 + 1):.4f},{measured:.4f},"
                f"{through:.4f}"
            )
            print(log[-1], flush=True)
            running = 0.0
            weights = {
                name: each.half().contiguous()
                for name, each in network.state_dict().items()
                if name != "lm_head.weight"  # that of the embedding
            }
            save_file(weights, arguments.output / "generator.safetensors")
            record.write_text("\n".join(log) + "\n")


if __name__ == "__main__":
    main()
