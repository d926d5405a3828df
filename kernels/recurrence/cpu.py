"""The recurrence of a GRU on a CPU: compiled where it is small, in ATen's operations elsewhere."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import first_line
from .aten import step_by_step, through_gru

__all__ = ["compiled", "recurrence"]

log = logging.getLogger("accel")

# Up to this width, and below so many sequences, the compiled recurrence is the fastest, elsewhere
# steps of ATen's operations; without it torch's own GRU is, for few sequences. Measured on 2 cores
# with AVX-512.
NARROW, FEW = 128, 32
SHARED = 16  # sequences, from which on threads share them


def recurrence(gates: Tensor, state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `op.recurrence`."""
    batch, width = state.shape
    if gates.dtype is torch.float32 and (width <= NARROW or batch < FEW):
        kernel, _ = compiled()
        if kernel is not None:
            states = gates.new_empty(*gates.shape[:2], width)
            threads = torch.get_num_threads() if batch >= SHARED else 1
            given = gates, state, weight, bias
            kernel(*(each.contiguous() for each in given), states, *states.shape, threads)
            return states
    return (through_gru if batch < FEW else step_by_step)(gates, state, weight, bias)


@functools.cache
def compiled() -> tuple[Callable[..., None] | None, str]:
    """`cpu.cpp`, compiled; else None, and why. Once a process, and kept in Inductor's cache."""
    try:
        from torch._inductor.codecache import CppPythonBindingsCodeCache  # slow to import

        types = ["const float*"] * 4 + ["float*"] + ["int64_t"] * 4
        source = Path(__file__).with_name("cpu.cpp").read_text(encoding="utf-8")
        found: Any = CppPythonBindingsCodeCache.load_pybinding(types, source, needs_vec_isa=True)
        return found, ""
    except Exception as error:  # any: of Inductor's, the compiler's or the loader's
        why = f"{type(error).__name__}: {first_line(error)}"
        log.warning("GRUs run in ATen's operations, as their C++ could not be compiled: %s", why)
        return None, why
