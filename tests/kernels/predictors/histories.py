"""Times and residuals that predictors are tried on, and a forecast as a run makes it."""

from __future__ import annotations

import torch
from accel.kernels.predictors import PREDICTORS, Predictor, moments
from hypothesis import strategies as st
from torch import Tensor

LONGEST = max(predictor.history for predictor in PREDICTORS.values())
gaps = st.lists(st.floats(0.01, 5.0), min_size=LONGEST, max_size=LONGEST)


def spaced(predictor: Predictor, spacing: list[float], batch: int) -> Tensor:
    """Times that fall by the given gaps, the step to predict first: `[history + 1, batch]`.

    Where there are more residuals than gaps, the gaps come again.
    """
    times = [0.0]
    for index in range(predictor.history):
        times.append(times[-1] + spacing[index % len(spacing)])
    return torch.tensor(times)[:, None].expand(-1, batch).contiguous()


def predict(
    predictor: Predictor, residuals: list[Tensor], times: Tensor, left: float = 0.5
) -> Tensor:
    """As a run does it: moments of the newest residual, coefficients, then the forecast."""
    newest, *older = residuals
    measured = moments(newest, older or [newest], newest, predictor.granularity)
    coefficients = predictor.coefficients(
        times.double(), torch.tensor(left, dtype=torch.float64), measured.double()
    )
    inputs = [torch.zeros_like(newest)] * 2 if predictor.reads_inputs else []
    known = None if coefficients is None else coefficients.float()
    return predictor.predict(residuals, known, inputs)


def random_residuals(predictor: Predictor, shape: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    return [base + 0.1 * torch.randn(shape, generator=generator) for _ in range(predictor.history)]


def each_history(predictor: Predictor, seed: int) -> tuple[Tensor, list[Tensor]]:
    """Times and residuals of a batch whose samples know 1, 2, 3, ... and all residuals."""
    generator = torch.Generator().manual_seed(seed)
    batch = predictor.history + 1
    steps = torch.rand(batch, predictor.history + 1, generator=generator).double() + 0.1
    times = 900 - 100 * steps.cumsum(1)
    times = times.flip(1).T  # the step to predict first, and lowest
    residuals = list(torch.randn(predictor.history, batch, 2, 3, generator=generator))
    for sample in range(predictor.history):
        times[sample + 2 :, sample] = times[sample + 1, sample]
        for residual in residuals[sample + 1 :]:
            residual[sample] = residuals[sample][sample]
    return times, residuals
