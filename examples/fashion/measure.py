"""Fidelity and quality of sampled pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from .classifier import Classifier

__all__ = ["agreement", "psnr"]


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
