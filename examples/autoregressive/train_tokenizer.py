"""Train the VQ tokenizer on Fashion-MNIST. About 5 minutes on 2 CPU cores.

    python -m accel.examples.autoregressive.train_tokenizer --steps 2000

Writes tokenizer.safetensors (fp16) and tokenizer_training.csv beside this file.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..fashion import data
from ..fashion.measure import psnr
from .tokenizer import CODES, Tokenizer

HERE = Path(__file__).parent
DECAY = 0.98  # of the codebook's averages
UNUSED = 0.1  # an average count below which a code starts anew


class Codebook:
    """Moves the codes to the mean of the features that are nearest to them."""

    def __init__(self, network: Tokenizer) -> None:
        self.network = network
        self.counts = torch.ones(CODES)
        self.sums = network.codebook.clone()

    @torch.no_grad()
    def follow(self, features: Tensor, codes: Tensor, generator: torch.Generator) -> None:
        """One step; codes that nothing is near to become one of the features."""
        rows, chosen = features.flatten(0, 2), codes.flatten()
        count = torch.bincount(chosen, minlength=CODES).float()
        self.counts.lerp_(count, 1 - DECAY)
        self.sums.lerp_(torch.zeros_like(self.sums).index_add_(0, chosen, rows), 1 - DECAY)
        unused = self.counts < UNUSED
        picked = torch.randint(len(rows), (CODES,), generator=generator)
        self.sums[unused] = rows[picked[unused]]
        self.counts[unused] = 1.0
        self.network.codebook.copy_(self.sums / self.counts[:, None])


@torch.no_grad()
def quality(network: Tokenizer, images: Tensor) -> tuple[float, int]:
    """Mean true PSNR in dB of pictures after tokens, and how many codes they use."""
    codes = torch.cat([network.encode(some) for some in images.split(500)])
    decoded = torch.cat([network.decode(some) for some in codes.split(500)])
    return float(psnr(decoded.clamp(-1, 1), images).mean()), len(codes.unique())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=HERE)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    images, _ = data.load("train")
    held_out, _ = data.load("test")
    network = Tokenizer()
    codebook = Codebook(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=arguments.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, arguments.rate, total_steps=arguments.steps, pct_start=0.1
    )
    generator = torch.Generator().manual_seed(arguments.seed)
    log = [f"# seed {arguments.seed}, batch {arguments.batch}, rate {arguments.rate}"]
    log.append("step,seconds,held_out_psnr,codes_used")
    started = time.time()
    for step in range(1, arguments.steps + 1):
        chosen = images[torch.randint(len(images), (arguments.batch,), generator=generator)]
        features = network.features(chosen)
        codes = network.nearest(features)
        quantised = network.codebook[codes]
        # The decoder's gradient goes on to the encoder as if nothing had been rounded.
        decoded = network.picture(features + (quantised - features).detach())
        loss = (decoded - chosen).square().mean() + 0.1 * (features - quantised).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        codebook.follow(features, codes, generator)
        if step % 200 == 0 or step == arguments.steps:
            measured, used = quality(network, held_out[:1000])
            log.append(f"{step},{time.time() - started:.0f},{measured:.2f},{used}")
            print(log[-1], flush=True)
            weights = {name: each.half() for name, each in network.state_dict().items()}
            save_file(weights, arguments.output / "tokenizer.safetensors")
            text = "\n".join(log) + "\n"
            (arguments.output / "tokenizer_training.csv").write_text(text)


if __name__ == "__main__":
    main()
