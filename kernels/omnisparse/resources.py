"""What the Triton kernels need on each GPU: compiled ahead of time, without one.

    python -m accel.kernels.omnisparse.resources

prints a table of registers, spills, shared memory, occupancy and matrix instructions of each
kernel. Spills have to be 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..resources import HEAD, TARGETS, Resources, compiled, report

__all__ = ["main", "measured"]

SIZES = {"fp16": 2, "bf16": 2, "fp32": 4}
TYPES = {
    **dict.fromkeys(("N", "M", "D", "G", "S", "LENGTH", "window", "begin", "segment"), "i32"),
    **dict.fromkeys(("keys", "budget", "rows", "counts"), "*i32"),
    **dict.fromkeys(("total", "shares", "delta", "grad_key", "grad_value"), "*fp32"),
    **dict.fromkeys(("scale", "slope_scale"), "fp32"),
    "valid": "*i1",
}


def measured(
    targets: Sequence[str] = tuple(TARGETS),
    dtypes: Sequence[str] = ("bf16",),
    widths: Sequence[int] = (64, 128),
) -> Iterator[Resources]:
    """Compile every kernel, causal and with padding, for these targets, types and head widths."""
    from . import triton as kernels

    for name in kernels.__all__:
        kernel = getattr(kernels, name)
        for target in targets:
            for dtype in dtypes:
                for width in widths:
                    yield _compiled(name, kernel, target, dtype, width)


def _compiled(name: str, kernel: Any, target: str, dtype: str, width: int) -> Resources:
    from .gpu import blocks_for, probe_blocks
    from .selection import PROBES

    size = SIZES[dtype]
    if name == "probe_kernel":
        blocks = probe_blocks(width, size)
    else:
        blocks = blocks_for(width, size, backward=name != "forward_kernel")
    constants: dict[str, Any] = {
        "GROUP": 3, "WIDTH": width, "CAUSAL": True, "PADDED": True,
        "BLOCK_QUERIES": blocks.queries, "BLOCK_KEYS": blocks.keys,
        "LISTED": False, "ATOMIC": True, "D": width, "PROBES": PROBES,
    }  # fmt: skip
    return compiled(
        kernel, target, dtype, width, types=TYPES, constants=constants, divisible={"D"},
        warps=blocks.warps, stages=blocks.stages,
    )  # fmt: skip


def main() -> None:
    """Print the table for all targets, types and widths."""
    print(HEAD)
    for dtype, widths in (("bf16", (32, 64, 128, 256)), ("fp32", (64, 128))):
        for row in measured(dtypes=(dtype,), widths=widths):
            print(report(row), flush=True)


if __name__ == "__main__":
    main()
