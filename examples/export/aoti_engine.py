"""Export the reference model to AOTInductor and sample with one of diffusers' schedulers.

python -m accel.examples.export.aoti_engine
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accel
import torch

from ..fashion import model as fashion


def main(path: Path = Path("dit.pt2"), pictures: int = 8, steps: int = 20) -> None:
    """Write `path`, read it back and sample `pictures` pictures without guidance."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    args, kwargs = fashion.example()
    accel.export(fashion.load(), args, kwargs, path=path, options={"pade": {"preset": "balanced"}})

    engine = accel.load(path)  # compiled for this kind of machine; needs torch alone
    scheduler: Any = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    labels = torch.arange(pictures) % 10
    images = torch.randn(pictures, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with accel.trajectory(engine, steps=steps):  # optional: makes the run explicit
        for time in scheduler.timesteps:
            velocity = engine(images, time.expand(pictures), labels).sample
            images = scheduler.step(velocity, time, images).prev_sample
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, run by {engine.providers[0]}")
    print(f"{len(images)} pictures with values in {images.min():.2f} .. {images.max():.2f}")
    print(engine.stats())


if __name__ == "__main__":
    main()
