"""What sparse attention could reach on a GPU: an ESTIMATE from operations and bytes, not measured.

    python -m accel.kernels.omnisparse.roofline

Each step is taken to run at the GPU's published dense bf16 rate or at its published memory rate,
whichever takes longer; real kernels reach a part of either. Bytes are counted once for each time
that a step has to read or write them, as if what a block of queries shares stayed in the caches.
"""

from __future__ import annotations

from dataclasses import dataclass

from .selection import PROBES, segment_count, segment_length

__all__ = ["GPUS", "Estimate", "Shape", "estimate", "main"]

GPUS = {  # operations and bytes a second, from the vendor's data sheets (SXM, dense bf16)
    "A100": (312e12, 2.04e12),
    "H100": (989e12, 3.35e12),
    "B200": (2250e12, 8.0e12),
}
NUMBER = 2  # bytes of bf16
SHARES = 12  # times that torch's operators read or write what the probes found, float32
SORTED = 16  # times that a sort reads or writes its rows, of a float32 and an int64


@dataclass(frozen=True)
class Shape:
    """A causal call: its sizes, and how much of it is left.

    budget: keys that are selected for a segment, as a share of those before it. active: share of
    the queries that see every key. window: see `Choice`.
    """

    batch: int
    heads: int
    key_heads: int
    tokens: int
    width: int
    budget: float = 0.15
    active: float = 0.1
    window: int = 128


@dataclass(frozen=True)
class Estimate:
    """Seconds; `dense` is exact causal attention. operations, bytes: of the sparse kernels alone.

    selection: a kernel computes the probes' scores twice; torch's operators rank and sort.
    """

    operations: float
    bytes: float
    dense: float
    sparse: float
    selection: float

    @property
    def gain(self) -> float:
        """How many times faster than dense, selection included."""
        return self.dense / (self.sparse + self.selection)


def estimate(shape: Shape, gpu: str) -> Estimate:
    """Of the forward pass."""
    rate, memory = GPUS[gpu]
    rows, tokens = shape.batch * shape.heads, shape.tokens
    length, segments = segment_length(tokens), segment_count(tokens)
    pairs = tokens * (tokens + 1) / 2
    near = tokens * (length / 2 + shape.window)
    far = max(pairs - near, 0)
    kept = near + far * (shape.budget + shape.active * (1 - shape.budget))
    operations = 4 * shape.width * kept * rows
    inputs = 2 * NUMBER * tokens * shape.width * shape.batch * (shape.heads + shape.key_heads)
    listed = segments * shape.budget * tokens / 2
    gathered = 2 * NUMBER * shape.width * shape.batch * shape.key_heads * listed
    moved = 2 * inputs + gathered  # once for the lazy pass, once for the active one
    scores = PROBES * segments * tokens / 2 * rows
    found = segments * tokens * shape.batch
    ranking = found * (4 * SHARES * shape.heads + 12 * SORTED * shape.key_heads)
    return Estimate(
        operations,
        moved,
        dense=max(4 * shape.width * pairs * rows / rate, inputs / memory),
        sparse=max(operations / rate, moved / memory),
        selection=4 * shape.width * scores / rate + ranking / memory,
    )


def main() -> None:
    """Print a table for 32 heads on 8, as in many models of 8 billion weights."""
    print("Estimates from data sheets; nothing here was measured.\n")
    print(
        "| GPU | tokens | width | operations | bytes | dense ms | sparse ms | selection ms | gain |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for gpu in GPUS:
        for width in (64, 128):
            for tokens in (8192, 32768, 131072):
                got = estimate(Shape(1, 32, 8, tokens, width), gpu)
                times = (1000 * each for each in (got.dense, got.sparse, got.selection))
                cells = [f"{got.operations:.3g}", f"{got.bytes:.3g}", *(f"{t:.3g}" for t in times)]
                print(f"| {gpu} | {tokens} | {width} | {' | '.join(cells)} | {got.gain:.2f} |")


if __name__ == "__main__":
    main()
