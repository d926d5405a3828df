"""Trying what was written: the translators have faults, and on the example inputs they show."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...kernels.errors import ExportError, first_line

__all__ = ["distance", "try_out"]

# Largest relative error: of 32 bits or more, and of fewer (or where choices may differ).
TOLERANCE, LOW_TOLERANCE = 1e-3, 5e-2


def try_out(
    run: Callable[[], Sequence[Tensor]], expected: Sequence[Tensor], selective: bool = False
) -> None:
    """Raise ExportError unless `run` works and returns what the model did on the example inputs.

    selective: whether the model has sparse attention: `expected` has it too, and depends on choices
    of keys, which rounding may tip.
    """
    try:
        results = run()
    except Exception as error:  # what runs the file raises errors of its own
        raise ExportError(
            f"what was written does not run on the example inputs: {first_line(error)}"
        ) from error
    for result, wanted in zip(results, expected, strict=True):
        exact = wanted.dtype.itemsize >= 4 and not selective
        limit = TOLERANCE if exact else LOW_TOLERANCE
        # What the model itself leaves undefined says nothing about the file.
        finite = torch.isfinite(wanted)
        if result.shape == wanted.shape:
            result, wanted = (torch.where(finite, each, 0).double() for each in (result, wanted))
        apart = distance(result, wanted)
        if apart > limit:
            raise ExportError(
                "what was written computes something else than the model on the example inputs "
                f"(relative error {apart:.1e}); the fault is in what translates the graph, so no "
                "file is left. Try another format"
            )


def distance(left: Tensor, right: Tensor) -> float:
    """Relative L2 distance; infinite between different shapes or broken values."""
    if left.shape != right.shape:
        return float("inf")
    size = max(float(left.norm()), float(right.norm()))
    if size == 0:
        return 0.0
    relative = float((left - right).norm()) / size
    return relative if relative == relative else float("inf")
