"""How much faster than plain `torch.compile` each tuned method is, alternating with it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..measure import keep_memory
from .fidelity import Contender, Counted
from .subjects import TUNING_SEED, Subject, final

__all__ = ["measure_speed"]


def measure_speed(
    subject: Subject,
    contenders: Sequence[Contender],
    pictures: int,
    repeats: int,
    progress: Callable[[str], None],
) -> None:
    """Fill in each row's `speedup`, and `speedup_eager` where accel has no part in it."""
    keep_memory()
    torch.compiler.reset()
    # One class of model is compiled once for each contender.
    with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024):
        timing = _Timing(subject, pictures, repeats)
        for contender in contenders:
            row = contender.row
            row.speedup = timing.ratio(contender, compiled=True)
            if contender.install is not None:
                row.speedup_eager = timing.ratio(contender, compiled=False)
            progress(f"{row.method}: {row.speedup}x compiled, {row.speedup_eager}x eager")


class _Timing:
    def __init__(self, subject: Subject, pictures: int, repeats: int) -> None:
        self.subject, self.repeats = subject, repeats
        self.inputs = subject.noise(pictures, TUNING_SEED)
        self.plain = torch.compile(subject.load())

    def ratio(self, contender: Contender, compiled: bool) -> float | None:
        """Median seconds of the plain run over the contender's; None if it can't be compiled."""
        row = contender.row
        if contender.install is not None:
            # A graph break in one model makes Dynamo break every later one of the class there.
            torch.compiler.reset()
        call, steps = self._callable(contender, compiled)
        try:
            self._seconds(call, steps)  # compiles
        except Exception as error:  # another project's code under a compiler: anything may come
            row.note = f"torch.compile: {type(error).__name__}: {error}".split("\n")[0][:200]
            return None
        self._seconds(self.plain, row.steps)
        plain, other = [], []
        for _ in range(self.repeats):
            plain.append(self._seconds(self.plain, row.steps))
            other.append(self._seconds(call, steps))
        return round(statistics.median(plain) / statistics.median(other), 2)

    def _callable(self, contender: Contender, compiled: bool) -> tuple[Any, int]:
        network = self.subject.load()
        row = contender.row
        if contender.pade is not None:
            options: Any = {"pade": contender.pade}
            return torch.compile(network, backend="accel", options=options), row.steps
        if contender.install is None:
            return torch.compile(network), row.computed
        with torch.no_grad():
            contender.install(network)
        call: Any = torch.compile(network) if compiled else network
        return Counted(call, network, row.steps, count=False), row.steps

    def _seconds(self, call: Any, steps: int) -> float:
        started = time.perf_counter()
        final(call, *self.inputs, steps)
        return time.perf_counter() - started
