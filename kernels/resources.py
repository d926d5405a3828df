"""What a Triton kernel needs on each GPU: compiled ahead of time, without one.

For AMD's targets it is read from the compiler's own notes in the assembly.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["HEAD", "TARGETS", "Resources", "compiled", "occupancy", "report"]

HEAD = """\
| kernel | target | type | width | registers | spills | shared | occupancy | matrix |
|---|---|---|---|---|---|---|---|---|"""
TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "gfx942": "gfx942"}
# Of a multiprocessor: warps, registers, bytes of shared memory; and what each block reserves of it.
LIMITS = {
    "sm_80": (64, 65536, 164 * 1024, 1024),
    "sm_90": (64, 65536, 228 * 1024, 1024),
    "sm_100": (64, 65536, 228 * 1024, 1024),
    "gfx942": (32, 131072, 64 * 1024, 1),
}


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


def compiled(
    kernel: Any, target: str, dtype: str, width: int, *, types: Mapping[str, str],
    constants: Mapping[str, Any], divisible: Collection[str], warps: int, stages: int,
) -> Resources:  # fmt: skip
    """Compile one kernel. types: of arguments, by name; the others are pointers to `dtype`.
    divisible: those that 16 divides at run time, beside all pointers. width: for the report."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, known = {}, {}
    for parameter in kernel.params:
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            known[(parameter.num,)] = constants[parameter.name]
        else:
            signature[parameter.name] = types.get(parameter.name, f"*{dtype}")
    # As at run time: memory is aligned, and so are sizes that a multiple of 16 divides.
    aligned = [
        (parameter.num,) for parameter in kernel.params
        if signature[parameter.name].startswith("*") or parameter.name in divisible
    ]  # fmt: skip
    attributes = {key: [["tt.divisibility", 16]] for key in aligned}
    which = TARGETS[target]
    gpu = GPUTarget("hip", which, 64) if isinstance(which, str) else GPUTarget("cuda", which, 32)
    source = ASTSource(kernel, signature, known, attributes)
    binary = triton.compile(source, target=gpu, options={"num_warps": warps, "num_stages": stages})
    registers, spills, matrix = _amd(binary) if isinstance(which, str) else _nvidia(binary)
    shared = binary.metadata.shared
    filled = occupancy(target, registers, shared, warps)
    name = kernel.__name__
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


def report(row: Resources) -> str:
    """A line of a table in Markdown, see HEAD."""
    return (
        f"| {row.kernel} | {row.target} | {row.dtype} | {row.width} | {row.registers} | "
        f"{row.spills} | {row.shared} | {row.occupancy:.2f} | {', '.join(row.matrix)} |"
    )
