"""Fidelity and quality of sampled pictures; a fair start for timings."""

from __future__ import annotations

import torch
from torch import Tensor

from .classifier import Classifier

__all__ = ["agreement", "keep_memory", "psnr"]


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """True PSNR of each picture in dB, `[batch]`: float pictures in [-1, 1], so the peak is 2.

    Capped at 120 dB, where float32 rounding begins, so that a mean stays finite.
    """
    error = (images.double() - reference.double()).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / error.clamp(min=4e-12))).float()


@torch.no_grad()
def agreement(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    """Share of pictures that the classifier takes for the class they were sampled as."""
    return float((classifier(images.clamp(-1, 1)).argmax(1) == labels).float().mean())


def keep_memory() -> None:
    """Let the C library keep freed memory, for the plain model as well as for the others.

    glibc returns large freed blocks to the system and faults them in again on the next step, until
    it has once seen a block of that size freed. Which model has the luck of that is chance.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8).fill_(0)
