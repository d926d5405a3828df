"""What Triton's interpreter needs for bfloat16."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9's interpreter keeps bfloat16 as its bits, multiplies those as integers, and cuts
    numbers off where a GPU rounds them to the nearest."""
    builder = interpreter.InterpreterBuilder
    multiply, cast = builder.create_dot, builder.cast_impl

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(numpy.uint32) << 16
        return interpreter.TensorHandle(bits.view(numpy.float32), tl.float32)

    def rounded(self: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            nearest = torch.from_numpy(numpy.asarray(source.data)).bfloat16().float().numpy()
            source = interpreter.TensorHandle(nearest, tl.float32)
        return cast(self, source, kind)

    monkeypatch.setattr(
        builder,
        "create_dot",
        lambda self, left, right, *rest: multiply(self, widened(left), widened(right), *rest),
    )
    monkeypatch.setattr(builder, "cast_impl", rounded)
    monkeypatch.setattr(builder, "create_fp_trunc", rounded)
