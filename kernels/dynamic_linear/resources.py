"""What the Triton kernels need on each GPU: compiled ahead of time, without one.

python -m accel.kernels.dynamic_linear.resources
"""

from __future__ import annotations

from collections.abc import Iterator

from ..resources import HEAD, TARGETS, Resources, compiled, report

__all__ = ["main", "measured"]

SIZES = ("R", "H", "K", "N", "k_stride", "n_stride")


def measured(width: int = 32) -> Iterator[Resources]:
    """Compile every kernel for all targets in bf16 and fp32. width: that 16 divides."""
    from . import triton as kernels
    from .gpu import blocks_for

    for name in kernels.__all__:
        for target in TARGETS:
            for dtype, size in (("bf16", 2), ("fp32", 4)):
                blocks = blocks_for(size)
                yield compiled(
                    getattr(kernels, name), target, dtype, width,
                    types=dict.fromkeys(SIZES, "i32"), constants=blocks.constants,
                    divisible={"H", "K", "N"}, warps=blocks.warps, stages=blocks.stages,
                )  # fmt: skip


def main() -> None:
    """Print the table."""
    print(HEAD)
    for row in measured():
        print(report(row), flush=True)


if __name__ == "__main__":
    main()
