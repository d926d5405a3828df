"""The reference model: trained, recognisable, and close to itself when steps are skipped."""

from __future__ import annotations

import math

import accel
import pytest
import torch
from accel.examples.fashion import classifier, measure, model


def pictures(network: object, count: int = 20, steps: int = 20) -> torch.Tensor:
    start = torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(5))
    *_, last = model.sample(network, start, torch.arange(count) % 10, steps=steps)
    return last


def test_pictures_are_what_they_were_asked_to_be() -> None:
    judge = classifier.load()
    plain = pictures(model.load())
    assert measure.agreement(judge, plain, torch.arange(20) % 10) >= 0.9


def test_skipping_is_closer_than_fewer_steps() -> None:
    """8 computed steps of 20 with a predictor, against 8 plain steps: the same work."""
    network = model.load()
    plain = pictures(network)
    fast = torch.compile(network, backend="accel", options={"lowering": "eager"})
    skipped = measure.psnr(pictures(fast), plain).mean()
    fewer = measure.psnr(pictures(network, steps=8), plain).mean()
    assert accel.stats(fast).full_steps == 8
    assert skipped > fewer + 4
    assert skipped > 35


def test_psnr_is_true_psnr() -> None:
    reference = torch.zeros(2, 1, 4, 4)
    images = reference.clone()
    images[1] += 0.2
    assert measure.psnr(images, reference).tolist() == pytest.approx(
        [120.0, 10 * math.log10(4 / 0.04)], abs=1e-3
    )


def test_frechet_distance_prefers_real_features() -> None:
    judge = classifier.load()
    plain = pictures(model.load())
    assert judge.frechet_distance(plain) < judge.frechet_distance(torch.randn_like(plain))
