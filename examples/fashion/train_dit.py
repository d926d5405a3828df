"""Train the reference DiT on Fashion-MNIST. About 90 minutes on 2 CPU cores.

    python -m accel.examples.fashion.train_dit --steps 3000

Writes dit.safetensors (exponential moving average, fp16) and dit_training.csv beside this file.
A run that was cut off goes on from `--state` if that file exists.
"""

import argparse
import copy
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from . import data, model

HERE = Path(__file__).parent


def zero_initialise(network: nn.Module) -> None:
    """Start every block as the identity (adaLN-Zero, Peebles & Xie 2023, section 3.2)."""
    for name, module in network.named_modules():
        zeroed = name.endswith(("norm1.linear", "proj_out_1", "proj_out_2"))
        if zeroed and isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def optimizers(network: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        hidden = name.startswith("transformer_blocks") and parameter.ndim == 2
        (matrices if hidden and "embedding_table" not in name else others).append(parameter)
    muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=rate, weight_decay=0.0, betas=(0.9, 0.99))]


def rate_factor(step: int, steps: int, warmup: int = 50, decay: float = 0.35) -> float:
    """Warm up, hold, then fall linearly to zero over the last `decay` of the run."""
    falling = (steps - step) / (decay * steps)
    return min(1.0, (step + 1) / warmup, falling)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, default=Path("dit_state.pt"))
    parser.add_argument("--output", type=Path, default=HERE)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    images, labels = data.load("train")
    # eval(): the blocks' label dropout is independent per block; ours below drops whole samples.
    network = model.build().eval()
    zero_initialise(network)
    average = copy.deepcopy(network)
    steppers = optimizers(network, arguments.rate)
    log: list[str] = []
    first = 0
    if arguments.state.exists():
        state = torch.load(arguments.state)
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        for stepper, saved in zip(steppers, state["steppers"], strict=True):
            stepper.load_state_dict(saved)
        first, log = state["step"], state["log"]
    forward = torch.compile(network)
    started, running = time.time(), 0.0

    for step in range(first, arguments.steps):
        # A generator per step: a resumed run sees the same batches as an uninterrupted one.
        random = torch.Generator().manual_seed(arguments.seed * 1_000_003 + step)
        chosen = torch.randint(len(images), (arguments.batch,), generator=random)
        clean, classes = images[chosen], labels[chosen].clone()
        dropped = torch.rand(arguments.batch, generator=random) < 0.1
        classes[dropped] = model.NO_CLASS
        noise = torch.randn(clean.shape, generator=random)
        t = torch.sigmoid(torch.randn(arguments.batch, generator=random) * 1.2 + 0.2)
        mix = t[:, None, None, None]
        predicted = forward(
            (1 - mix) * clean + mix * noise,
            timestep=t * 1000,
            class_labels=classes,
            return_dict=False,
        )[0]
        loss = (predicted - (noise - clean)).pow(2).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = arguments.rate * rate_factor(step, arguments.steps)
            stepper.step()
            stepper.zero_grad()
        keep = min(0.999, (step + 1) / (step + 10))
        with torch.no_grad():
            for smooth, current in zip(average.parameters(), network.parameters(), strict=True):
                smooth.lerp_(current, 1 - keep)

        running = loss.item() if not running else 0.98 * running + 0.02 * loss.item()
        if not math.isfinite(running):
            raise RuntimeError(f"the loss is {running} at step {step}: lower --rate")
        if (step + 1) % 50 == 0:
            log.append(f"{step + 1},{running:.5f},{time.time() - started:.0f}")
            print(log[-1], flush=True)
        if (step + 1) % 250 == 0 or step + 1 == arguments.steps:
            temporary = arguments.state.with_suffix(".tmp")
            torch.save(
                {
                    "network": network.state_dict(),
                    "average": average.state_dict(),
                    "steppers": [stepper.state_dict() for stepper in steppers],
                    "step": step + 1,
                    "log": log,
                },
                temporary,
            )
            temporary.replace(arguments.state)
            weights = {k: v.half().contiguous() for k, v in average.state_dict().items()}
            save_file(weights, arguments.output / "dit.safetensors")
            header = f"# seed {arguments.seed}, batch {arguments.batch}, rate {arguments.rate}\n"
            (arguments.output / "dit_training.csv").write_text(
                header + "step,loss,seconds\n" + "\n".join(log) + "\n"
            )


if __name__ == "__main__":
    main()
