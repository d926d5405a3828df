"""How a dynamic recommender's memory and time grow with items and with users; made-up data.

    python -m accel.examples.recommender.scale --output examples/recommender/results

writes scale.csv: for each count of items a process of its own trains some steps and recommends to
64 users at a time; for each count of users, of 10,000 items, one recommends to all of them, 1,024
at a time. Where a catalogue outgrows one device, `sharded` gives each process a part of the tables:

    torchrun --nproc-per-node 2 -m accel.examples.recommender.scale --sharded
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

from ...compiler.models.solid import DynamicModel, Recommender, dynamize
from ..records import write
from .backbones import DYNAMIC, SASRec
from .train import Objective

__all__ = ["made_up", "main", "sharded"]

LENGTH, LABELS, BATCH, CANDIDATES = 20, 60, 256, 65


def made_up(items: int) -> DynamicModel:
    """SOLID on SASRec, with labels and a codebook that mean nothing."""
    torch.manual_seed(0)
    return dynamize(
        SASRec(items), DYNAMIC, history="history", items=items,
        semantics=torch.arange(items) % LABELS, codebook=torch.randn(LABELS, 32),
    )  # fmt: skip


def sharded(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """The model with the rows of its items' tables shared out among the processes of a mesh, in
    place: each looks up the rows that it has, and all add up what they found. The rest of the
    model is on every process, and all are given the same batch."""
    tables = "model.table", "hypernetwork.items.table"
    return parallelize_module(
        model, mesh, {name: RowwiseParallel(input_layouts=Replicate()) for name in tables}
    )


def _step(model: nn.Module, items: int) -> Callable[[], float]:
    objective = Objective(model, 0.1)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    generator = torch.Generator().manual_seed(0)

    def step() -> float:
        histories = torch.randint(1, items, (BATCH, LENGTH), generator=generator)
        candidates = torch.randint(1, items, (BATCH, CANDIDATES), generator=generator)
        loss = objective(histories, candidates)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def _milliseconds(call: Callable[[], Any], repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        taken.append(1e3 * (time.perf_counter() - started))
    return round(statistics.median(taken), 1)


def _megabytes() -> int:
    """The most that this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _compiled(model: nn.Module, items: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    recommender: Any = Recommender(model.eval(), items=items)
    options: Any = {"codebook": {"table_bytes": 2**30}}
    return torch.compile(
        recommender, backend="accel", fullgraph=True, dynamic=False, options=options
    )


def _items(items: int) -> dict[str, Any]:
    before = _megabytes()
    model = made_up(items)
    step = _step(model, items)
    step()  # makes the optimizer's state
    row: dict[str, Any] = {"items": items, "users": BATCH, "what": "training step"}
    return row | {"ms": _milliseconds(step, 5), "megabytes": _megabytes() - before}


@torch.no_grad()
def _served(items: int, users: int, batch: int) -> dict[str, Any]:
    before = _megabytes()
    run = _compiled(made_up(items), items)
    histories = torch.randint(1, items, (users, LENGTH))
    run(histories[:batch])  # compiles, and computes the tables
    started = time.perf_counter()
    for some in histories.split(batch):
        run(some)
    taken = round(1e3 * (time.perf_counter() - started), 1)
    row = {"items": items, "users": users, "what": f"top 10, {batch} users a call"}
    return row | {"ms": taken, "megabytes": _megabytes() - before}


def _sharded() -> None:
    """The loss of some steps, with whole tables and with shared ones; the first process prints."""
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    whole = _step(made_up(10_001), 10_001)
    parts = sharded(made_up(10_001), mesh)
    shared = _step(parts, 10_001)
    pairs = [(whole(), shared()) for _ in range(4)]
    table: Any = parts.get_parameter("hypernetwork.items.table.weight")
    if torch.distributed.get_rank() == 0:
        print(f"rows of a table here: {len(table.to_local())} of {len(table)}")
        for one, other in pairs:
            print(f"loss: whole {one:.6f}, shared {other:.6f}")
    torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("accel_bench"))
    parser.add_argument("--sharded", action="store_true")
    parser.add_argument("--items", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--users", type=int, nargs="*", default=[10_240, 102_400, 1_024_000])
    arguments = parser.parse_args()
    if arguments.sharded:
        return _sharded()
    work: list[tuple[Callable[..., Any], tuple[int, ...]]] = []
    for items in arguments.items:
        work += [(_items, (items,)), (_served, (items, 64, 64))]
    work += [(_served, (10_000, users, 1024)) for users in arguments.users]
    rows = []
    for function, given in work:
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # memory of its own
            rows.append(pool.apply(function, given))
        print(rows[-1], flush=True)
        write(arguments.output / "scale.csv", rows)
    return None


if __name__ == "__main__":
    main()
