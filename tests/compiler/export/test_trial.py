"""What a trial lets through, and what not."""

from __future__ import annotations

import pytest
import torch
from accel import ExportError
from accel.compiler.export.trial import try_out

VALUES = torch.linspace(-1, 1, 64)


@pytest.mark.parametrize(
    ("dtype", "factor", "fine"),
    [
        (torch.float32, 1.0005, True),
        (torch.float32, 1.002, False),
        (torch.float16, 1.03, True),
        (torch.float16, 1.1, False),
    ],
)
def test_tolerances(dtype: torch.dtype, factor: float, fine: bool) -> None:
    wanted = VALUES.to(dtype)
    if fine:
        try_out(lambda: [wanted * factor], [wanted])
        return
    with pytest.raises(ExportError, match="computes something else"):
        try_out(lambda: [wanted * factor], [wanted])


def test_broken_values_and_shapes() -> None:
    broken = torch.where(VALUES > 0.9, torch.nan, VALUES)
    try_out(lambda: [VALUES], [broken])  # the model's own NaN says nothing
    for result in (broken, VALUES[:10]):
        with pytest.raises(ExportError, match="error inf"):
            try_out(lambda result=result: [result], [VALUES])


def test_what_does_not_run() -> None:
    def run() -> list[torch.Tensor]:
        raise RuntimeError("no such kernel\nand more")

    with pytest.raises(ExportError, match=r"does not run on the example inputs: no such kernel$"):
        try_out(run, [VALUES])
