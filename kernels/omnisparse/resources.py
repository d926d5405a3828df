"""What the Triton kernels need on each GPU: compiled ahead of time, without one.

    python -m accel.kernels.omnisparse.resources

prints a table of registers, spills, shared memory, occupancy and matrix instructions of each
kernel. Spills have to be 0. For AMD's targets they are read from the compiler's own notes in the
assembly.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["TARGETS", "Resources", "main", "measured"]

TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "gfx942": "gfx942"}
# Of a multiprocessor: warps, registers, bytes of shared memory; and what each block reserves of it.
LIMITS = {
    "sm_80": (64, 65536, 164 * 1024, 1024),
    "sm_90": (64, 65536, 228 * 1024, 1024),
    "sm_100": (64, 65536, 228 * 1024, 1024),
    "gfx942": (32, 131072, 64 * 1024, 1),
}
SIZES = {"fp16": 2, "bf16": 2, "fp32": 4}
INTEGERS = {"N", "M", "D", "G", "S", "LENGTH", "window", "begin", "segment"}
OTHER_POINTERS = {
    "keys": "*i32", "budget": "*i32", "rows": "*i32", "counts": "*i32", "valid": "*i1",
    "total": "*fp32", "shares": "*fp32", "delta": "*fp32", "grad_key": "*fp32",
    "grad_value": "*fp32",
}  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """One kernel on one target. registers, spills: of a thread; shared: bytes of a block of
    threads; matrix: the matrix instructions it uses, by their names. occupancy: the share of a
    multiprocessor's places for warps that can be filled, as far as registers and shared memory go.
    """

    kernel: str
    target: str
    dtype: str
    width: int
    registers: int
    spills: int
    shared: int
    occupancy: float
    matrix: tuple[str, ...]


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
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

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
    signature, known = {}, {}
    for parameter in kernel.params:
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            known[(parameter.num,)] = constants[parameter.name]
        elif parameter.name in INTEGERS:
            signature[parameter.name] = "i32"
        elif "scale" in parameter.name:
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = OTHER_POINTERS.get(parameter.name, f"*{dtype}")
    # As at run time: memory is aligned, and so are sizes that a multiple of 16 divides.
    divisible = [
        (parameter.num,) for parameter in kernel.params
        if signature[parameter.name].startswith("*") or parameter.name == "D"
    ]  # fmt: skip
    attributes = {key: [["tt.divisibility", 16]] for key in divisible}
    which = TARGETS[target]
    gpu = GPUTarget("hip", which, 64) if isinstance(which, str) else GPUTarget("cuda", which, 32)
    source = ASTSource(kernel, signature, known, attributes)
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    binary = triton.compile(source, target=gpu, options=options)
    found = _amd(binary) if isinstance(which, str) else _nvidia(binary)
    registers, spills, matrix = found
    shared = binary.metadata.shared
    filled = occupancy(target, registers, shared, blocks.warps)
    return Resources(name, target, dtype, width, registers, spills, shared, filled, matrix)


def occupancy(target: str, registers: int, shared: int, warps: int) -> float:
    """See `Resources`; from the vendors' tables of what a multiprocessor has."""
    places, all_registers, memory, reserved = LIMITS[target]
    lanes = 64 if target == "gfx942" else 32
    own = -(-registers // 8) * 8 * lanes * warps
    blocks = min(all_registers // own, memory // (shared + reserved), places // warps)
    return blocks * warps / places


def _nvidia(binary: Any) -> tuple[int, int, tuple[str, ...]]:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        usage = _output([knobs.nvidia.cuobjdump.path, "-res-usage", str(path)])
        code = _output([knobs.nvidia.nvdisasm.path, "-c", str(path)])
    registers = max(map(int, re.findall(r"REG:(\d+)", usage)))
    spilled = sum(map(int, re.findall(r"LOCAL:(\d+)", usage)))
    spilled += sum(map(int, re.findall(r"STACK:(\d+)", usage)))
    matrix = re.findall(r"\b(HGMMA|UTCHMMA|UTCQMMA|HMMA|FFMA)\b", code)
    return registers, spilled, tuple(sorted(set(matrix)))


def _amd(binary: Any) -> tuple[int, int, tuple[str, ...]]:
    text = binary.asm["amdgcn"]
    registers = max(map(int, re.findall(r"\.vgpr_count:\s+(\d+)", text)))
    spilled = max(map(int, re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)))
    return registers, spilled, tuple(sorted(set(re.findall(r"\b(v_mfma_\w+?)_", text))))


def _output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Print the table for all targets, types and widths."""
    print("| kernel | target | type | width | registers | spills | shared | occupancy | matrix |")
    print("|---|---|---|---|---|---|---|---|---|")
    for dtype, widths in (("bf16", (32, 64, 128, 256)), ("fp32", (64, 128))):
        for row in measured(dtypes=(dtype,), widths=widths):
            print(
                f"| {row.kernel} | {row.target} | {row.dtype} | {row.width} | {row.registers} | "
                f"{row.spills} | {row.shared} | {row.occupancy:.2f} | {', '.join(row.matrix)} |",
                flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
