"""Trains one of the generators.

    python -m accel.examples.generators.train flux --data emoji-datasource-google-16.0.0.tgz

Writes NAME.safetensors (exponential moving average, fp16, with 64 conditions to sample with) and
NAME_training.csv beside this file. A run that was cut off goes on from `--state` if that exists.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..fashion.train_dit import rate_factor
from . import GENERATORS
from .base import HERE, Data, Generator, Network, between

CONDITIONS = 64  # that a checkpoint carries, to sample with
STRONGEST = 4.0  # guidance that is learnt as an input, from 1 on


class Training:
    """The state of one training: what a cut-off run goes on from."""

    def __init__(self, kind: Generator, words: int, seed: int) -> None:
        torch.manual_seed(seed)
        # eval(): diffusers' own dropout of labels is independent per block; ours drops samples.
        self.kind, self.seed = kind, seed
        self.network = kind.build(words).eval()
        kind.zero(self.network)
        self.average = copy.deepcopy(self.network)
        self.teacher: Network | None = None
        # Not Muon, which computes in bfloat16: here that takes four times as long as all the rest.
        self.stepper = torch.optim.AdamW(
            self.network.parameters(), lr=kind.rate, weight_decay=0.0, betas=(0.9, 0.99)
        )
        self.step, self.log = 0, list[str]()

    def batch(self, samples: Tensor, conditions: Tensor) -> tuple[Any, ...]:
        """The step's noisy samples, times, targets and conditions."""
        # A generator per step: a resumed run sees the same batches as an uninterrupted one.
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        chosen = torch.randint(len(samples), (self.kind.batch,), generator=draw)
        clean, told = samples[chosen].float() / 127.5 - 1, conditions[chosen].clone()
        if self.teacher is None:
            dropped = torch.rand(len(chosen), generator=draw) < 0.1
            told[dropped] = self.kind.nothing(told[dropped])
        noise = torch.randn(clean.shape, generator=draw)
        return draw, told, *self.kind.corrupt(clean, noise, draw)

    def loss(self, samples: Tensor, conditions: Tensor) -> Tensor:
        """The mean squared error of one step's prediction."""
        draw, conditions, noisy, times, target = self.batch(samples, conditions)
        embedded = self.kind.embed(self.network, conditions)
        if self.teacher is not None:
            guidance = 1 + (STRONGEST - 1) * torch.rand(len(times), generator=draw)
            embedded["guidance"] = guidance
            with torch.no_grad():
                told, untold = (
                    self.kind.predict(
                        self.teacher.transformer, noisy, times, self.kind.embed(self.teacher, each)
                    )
                    for each in (conditions, self.kind.nothing(conditions))
                )
                target = between(untold, told, guidance)
        output = self.kind.predict(self.network.transformer, noisy, times, embedded)
        return (output - target).square().mean()

    def advance(self, samples: Tensor, conditions: Tensor, rate: float) -> float:
        """One step. Returns its loss."""
        if self.teacher is None and self.step >= self.kind.distilled * self.kind.steps:
            self.teacher = copy.deepcopy(self.average)
        loss = self.loss(samples, conditions)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for group in self.stepper.param_groups:
            group["lr"] = rate
        self.stepper.step()
        self.stepper.zero_grad()
        self.step += 1
        keep = min(0.999, self.step / (self.step + 9))
        with torch.no_grad():
            pairs = zip(self.average.parameters(), self.network.parameters(), strict=True)
            for smooth, current in pairs:
                smooth.lerp_(current, 1 - keep)
        return loss.item()

    def save(self, path: Path) -> None:
        """Writes what `resume` reads; a cut-off write leaves the old file."""
        temporary = path.with_suffix(".tmp")
        teacher = self.teacher
        state = {
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "teacher": None if teacher is None else teacher.state_dict(),
            "stepper": self.stepper.state_dict(),
            "step": self.step,
            "log": self.log,
        }
        torch.save(state, temporary)
        temporary.replace(path)

    def resume(self, path: Path) -> None:
        """Goes on from what `save` wrote."""
        state = torch.load(path)
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        if state["teacher"] is not None:
            self.teacher = copy.deepcopy(self.average)
            self.teacher.load_state_dict(state["teacher"])
        self.stepper.load_state_dict(state["stepper"])
        self.step, self.log = state["step"], state["log"]


def train(
    kind: Generator, data: Data, state: Path, output: Path, *, seed: int = 0, compiled: bool = True
) -> None:
    """Trains to the end, from `state` on where that exists; writes the checkpoint into `output`.

    Raises RuntimeError where the loss is no number any more.
    """
    samples, conditions, words = data
    order = torch.randperm(len(conditions), generator=torch.Generator().manual_seed(0))
    training = Training(kind, len(words), seed)
    if state.exists():
        training.resume(state)
    if compiled:
        training.network.transformer.compile()
    started, running = time.time(), 0.0
    while training.step < kind.steps:
        rate = kind.rate * rate_factor(training.step, kind.steps)
        loss = training.advance(samples, conditions, rate)
        running = 0.98 * running + 0.02 * loss if running else loss
        if not math.isfinite(running):
            raise RuntimeError(f"the loss is {running} at step {training.step}: lower the rate")
        ended = training.step == kind.steps
        if training.step % 50 == 0 or ended:
            training.log.append(f"{training.step},{running:.5f},{time.time() - started:.0f}")
            print(training.log[-1], flush=True)
        if training.step % 250 == 0 or ended:
            training.save(state)
            weights = {k: v.half().contiguous() for k, v in training.average.state_dict().items()}
            weights["conditions"] = conditions[order[:CONDITIONS]].to(torch.int16)
            save_file(weights, output / f"{kind.name}.safetensors", {"words": json.dumps(words)})
            header = f"# seed {seed}, batch {kind.batch}, rate {kind.rate}\n"
            (output / f"{kind.name}_training.csv").write_text(
                header + "step,loss,seconds\n" + "\n".join(training.log) + "\n"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("generator", choices=sorted(GENERATORS))
    parser.add_argument("--data", type=Path, help="the emoji's archive")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--output", type=Path, default=HERE)
    arguments = parser.parse_args()
    kind = GENERATORS[arguments.generator]
    path = arguments.state or Path(f"{kind.name}_state.pt")
    train(kind, kind.data(arguments.data), path, arguments.output, seed=arguments.seed)


if __name__ == "__main__":
    main()
