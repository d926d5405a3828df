"""How much faster than plain `torch.compile` each tuned method is, alternating with it."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from .fidelity import Contender, Counted
from .subjects import TUNING_SEED, Subject, final

__all__ = ["keep_memory", "measure_speed"]


def keep_memory() -> None:
    """Let the C library keep freed memory, for the plain model as well as for the others.

    glibc returns large freed blocks to the system and faults them in again on the next step, until
    it has once seen a block of that size freed. Which model has the luck of that is chance.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8).fill_(0)


def measure_speed(subject: Subject, contender: Contender, pictures: int, repeats: int) -> None:
    """Fill in the row's `speedup` and `speedup_eager`."""
    row = contender.row
    steps = row.computed if contender.pade is None and contender.install is None else row.steps
    row.speedup = _ratio(subject, contender, steps, pictures, repeats, True)
    if contender.install is not None:
        row.speedup_eager = _ratio(subject, contender, steps, pictures, repeats, False)


def _ratio(
    subject: Subject, contender: Contender, steps: int, pictures: int, repeats: int, compiled: bool
) -> float | None:
    keep_memory()
    torch.compiler.reset()
    inputs = subject.noise(pictures, TUNING_SEED)
    plain = torch.compile(subject.load())
    network = subject.load()
    call: Any = torch.compile(network) if compiled else network
    if contender.pade is not None:
        options: Any = {"pade": contender.pade}
        call = torch.compile(network, backend="accel", options=options)
    elif contender.install is not None:
        with torch.no_grad():
            contender.install(network)
        call = Counted(call, network, steps, count=False)
    length = contender.row.steps
    try:
        for _ in range(2):  # the first compiles, the second sees what recompiles
            final(plain, *inputs, length)
            final(call, *inputs, steps)
    except Exception as error:  # another project's code under a compiler: anything may come
        contender.row.note = f"torch.compile: {type(error).__name__}: {error}"[:200]
        return None
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for one, each, count in zip(times, (plain, call), (length, steps), strict=True):
            started = time.perf_counter()
            final(each, *inputs, count)
            one.append(time.perf_counter() - started)
    return round(statistics.median(times[0]) / statistics.median(times[1]), 2)
