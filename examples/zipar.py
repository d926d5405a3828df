"""The same pictures decoded one token at a time, and row beside row.

    python -m accel.examples.zipar

writes zipar.png: a row for each way, a column for each class, with the passes that each took. All
ways draw from the same random numbers. The first picture of each way waits for its compilation.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..compiler.extras import optional
from .autoregressive.generator import END_OF_LINE, codes_of, load_generator, prompt_of
from .autoregressive.tokenizer import CODES, COLUMNS, ROWS, load_tokenizer
from .fashion.data import CLASSES

__all__ = ["WAYS", "decoded", "main"]

# How each row of the figure is decoded.
WAYS: dict[str, dict[str, Any]] = {
    "one token at a time": {"window": COLUMNS},
    "window 8": {"window": 8},
    "window 4": {"window": 4},
    "window 3": {"window": 3},
    "window 2": {"window": 2},
    "adaptive, from 2": {"window": 2, "adaptive": True},
}


def decoded(model: Any, labels: Tensor, seed: int, **settings: Any) -> tuple[Tensor, Tensor]:
    """Codes, int64 [B, ROWS, COLUMNS], of pictures of these classes, and the passes of each."""
    from ..compiler.models.zipar import ZipAR

    zipar = ZipAR(ROWS, COLUMNS, end_of_line=END_OF_LINE, allowed=range(CODES), **settings)
    torch.manual_seed(seed)
    prompts = prompt_of(labels)
    whole = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), custom_generate=zipar, do_sample=True,
        max_new_tokens=zipar.raster.tokens,
    )  # fmt: skip
    assert zipar.passes is not None
    return codes_of(whole[:, 1:]), zipar.passes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("zipar.png"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pyplot: Any = optional("matplotlib.pyplot", "examples")
    model, tokenizer = load_generator(), load_tokenizer()
    labels = torch.arange(len(CLASSES))
    figure, axes = pyplot.subplots(len(WAYS), len(CLASSES), figsize=(11, 1.25 * len(WAYS)))
    for line, (name, settings) in zip(axes, WAYS.items(), strict=True):
        codes, passes = decoded(model, labels, arguments.seed, **settings)
        with torch.no_grad():
            pictures = tokenizer.decode(codes).clamp(-1, 1)
        print(f"{name}: {passes.float().mean():.0f} passes", flush=True)
        for place, picture in zip(line, pictures, strict=True):
            place.imshow(picture[0], cmap="gray_r", vmin=-1, vmax=1)
            place.set_xticks([])
            place.set_yticks([])
        label = f"{name}\n{passes.float().mean():.0f} passes"
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
    for place, name in zip(axes[0], CLASSES, strict=True):
        place.set_title(name, fontsize=9)
    figure.tight_layout(pad=0.3)
    figure.savefig(arguments.output, dpi=110)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
