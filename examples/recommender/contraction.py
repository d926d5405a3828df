"""When it is cheaper to make no matrices: what the rule in `passes/contraction.py` is from.

    python -m accel.examples.recommender.contraction --output examples/recommender/results

writes contraction.csv: one generated layer, compiled with and without its matrices, and what the
rule chooses. Some minutes.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ...compiler.report import report_of
from ...passes.codebook.contraction import Generated
from ..records import seconds, write

__all__ = ["main"]

SIZES = [  # of the vectors, the layer's inputs and its outputs
    (32, 32, 32), (64, 64, 64), (32, 128, 128), (64, 128, 128), (128, 128, 128), (128, 128, 32),
    (128, 32, 128), (32, 256, 256),
]  # fmt: skip
USERS = (1, 4, 16, 64, 256, 1024)
MOST = 3e8  # bytes of matrices


class _Layer(nn.Module):
    """A layer for each user, as DUET generates it."""

    def __init__(self, vectors: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.generate = nn.Linear(vectors, (inputs + 1) * outputs)

    def forward(self, row: Tensor, vector: Tensor) -> Tensor:
        values = self.generate(vector)
        matrix, shift = values.split([self.inputs * self.outputs, self.outputs], 1)
        matrix = matrix.unflatten(1, (self.inputs, self.outputs))
        return torch.baddbmm(shift[:, None], row[:, None], matrix)[:, 0]


@torch.no_grad()
def _compared(sizes: tuple[int, int, int], users: int) -> dict[str, Any]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = _Layer(*sizes)
    given = torch.randn(users, sizes[1]), torch.randn(users, sizes[0])
    runs: list[Any] = []
    by_rule = False
    for cheaper in (None, False, True):  # as the rule has it, without, with
        # Other options, or Dynamo would take one graph for all.
        options: Any = {"codebook": {"table_bytes": 2**30 + len(runs)}}
        run = torch.compile(model, backend="accel", fullgraph=True, dynamic=False, options=options)
        if cheaper is None:
            run(*given)
            by_rule = bool(report_of(run).passes["codebook"].matched)
        else:
            with patch.object(Generated, "is_cheaper", lambda _, chosen=cheaper: chosen):
                run(*given)
        runs.append(run)
    pair = runs[1:]
    repeats = 15 if users * sizes[1] * sizes[2] > 2**22 else 301
    taken = [[seconds(each, given) for each in pair] for _ in range(repeats)]
    matrices, contracted = (statistics.median(each) for each in zip(*taken, strict=True))
    apart = pair[0](*given) - pair[1](*given)
    return {
        "vectors": sizes[0], "inputs": sizes[1], "outputs": sizes[2], "users": users,
        "matrices_us": round(1e6 * matrices), "contracted_us": round(1e6 * contracted),
        "speedup": round(matrices / contracted, 2), "contracted_by_rule": by_rule,
        "difference": float(apart.abs().max()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("accel_bench"))
    arguments = parser.parse_args()
    rows = []
    for sizes in SIZES:
        for users in USERS:
            if 4 * users * sizes[1] * sizes[2] <= MOST:
                rows.append(_compared(sizes, users))
                print(rows[-1], flush=True)
    write(arguments.output / "contraction.csv", rows)


if __name__ == "__main__":
    main()
