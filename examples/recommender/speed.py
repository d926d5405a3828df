"""What the codebook pass gains over Inductor on the same dynamic recommender.

    python -m accel.examples.recommender.speed --output examples/recommender/results

writes speed.csv; random weights, as speed does not depend on them. Inductor alone unrolls a GRU's
steps: with histories of 50 it compiles for minutes.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from torch._inductor.async_compile import shutdown_compile_workers
from torch._inductor.utils import fresh_cache

from ...compiler.models.solid import Recommender, dynamize
from ..records import seconds, write
from .backbones import BACKBONES, DYNAMIC

__all__ = ["main"]

ITEMS, LABELS = 10_001, 60


@torch.no_grad()
def _compared(
    name: str, users: int, candidates: int | None, length: int, repeats: int
) -> dict[str, Any]:
    """candidates: None is the best 10 of the whole catalogue."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = dynamize(
        BACKBONES[name](ITEMS), DYNAMIC, history="history", items=ITEMS,
        semantics=torch.arange(ITEMS) % LABELS, codebook=torch.randn(LABELS, 32),
    )  # fmt: skip
    for each in model.parameters():
        each.add_(0.05 * torch.randn_like(each))
    run: Any = model.eval() if candidates else Recommender(model, items=ITEMS).eval()
    inputs = [torch.randint(1, ITEMS, (users, length))]
    if candidates:
        inputs.append(torch.randint(1, ITEMS, (users, candidates)))
    given = tuple(inputs)
    plain = torch.compile(run, fullgraph=True, dynamic=False)
    ours = torch.compile(
        run, backend="accel", fullgraph=True, dynamic=False, options={"codebook": True}
    )
    first = [seconds(each, given) for each in (plain, ours)]
    shutdown_compile_workers()  # they take time from the processor for some seconds more
    taken = [[seconds(each, given) for each in (plain, ours)] for _ in range(repeats)]
    inductor, accel = (statistics.median(each) for each in zip(*taken, strict=True))
    one, other = plain(*given), ours(*given)
    if not candidates:
        one, other = one[0], other[0]
    return {
        "model": name, "users": users, "candidates": candidates or "catalogue", "history": length,
        "inductor_ms": round(1e3 * inductor, 3), "accel_ms": round(1e3 * accel, 3),
        "speedup": round(inductor / accel, 2), "inductor_compile_s": round(first[0], 1),
        "accel_compile_s": round(first[1], 1), "difference": float((one - other).abs().max()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("accel_bench"))
    parser.add_argument("--length", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=2001, help="of calls for one user")
    arguments = parser.parse_args()
    rows = []
    for name in ("SASRec", "GRU4Rec"):
        for users, candidates in ((1, 10_000), (1, None), (1024, None)):
            with fresh_cache():  # so that compiling takes what it takes the first time
                repeats = max(arguments.repeats // users, 11)
                rows.append(_compared(name, users, candidates, arguments.length, repeats))
            print(rows[-1], flush=True)
            write(arguments.output / "speed.csv", rows)


if __name__ == "__main__":
    main()
