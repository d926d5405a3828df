"""The estimate for GPUs: that it follows from what is left, and names all GPUs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from accel.kernels.omnisparse.roofline import GPUS, Shape, estimate, main

SHAPE = Shape(1, 32, 8, 32768, 128)


@pytest.mark.parametrize("gpu", GPUS)
def test_gain_comes_from_what_is_left_out(gpu: str) -> None:
    everything = estimate(replace(SHAPE, budget=1.0), gpu)
    assert everything.sparse >= everything.dense  # and selecting comes on top
    assert everything.gain < 1
    gains = [estimate(replace(SHAPE, budget=each), gpu).gain for each in (0.5, 0.2, 0.1)]
    assert gains == sorted(gains)
    lengths = [estimate(replace(SHAPE, tokens=n), gpu).gain for n in (4096, 16384, 65536)]
    assert lengths == sorted(lengths)


def test_dense_operations() -> None:
    """4 D for each pair: 32 heads, 128 wide, at the published rate."""
    assert estimate(SHAPE, "H100").dense == pytest.approx(4 * 128 * 32 * 32768 * 32769 / 2 / 989e12)


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    lines = capsys.readouterr().out.splitlines()
    assert "nothing here was measured" in lines[0]
    assert sum(line.startswith(tuple(f"| {gpu} " for gpu in GPUS)) for line in lines) == 18
