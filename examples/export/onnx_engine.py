"""Export the reference model to ONNX, load it, and sample pictures with the engine.

python -m accel.examples.export.onnx_engine
"""

from __future__ import annotations

from pathlib import Path

import accel
import torch

from ..fashion import model as fashion


def main(path: Path = Path("dit.onnx"), pictures: int = 8) -> None:
    """Write `path`, read it back and sample `pictures` pictures at 20 steps."""
    labels = torch.arange(pictures) % 10
    args, kwargs = fashion.example()
    accel.export(fashion.load(), args, kwargs, path=path, options={"pade": {"preset": "balanced"}})

    engine = accel.load(path)  # on another machine: only onnxruntime and torch are needed here
    noise = torch.randn(pictures, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    *_, images = fashion.sample(engine, noise, labels)
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, run by {engine.providers[0]}")
    print(f"{len(images)} pictures with values in {images.min():.2f} .. {images.max():.2f}")
    print(engine.stats())


if __name__ == "__main__":
    main()
