"""Seconds for a picture, against transformers' own compiled decoding with a static cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ....compiler.models.zipar import ZipAR
from ....compiler.report import stats
from ..generator import END_OF_LINE, prompt_of
from ..tokenizer import CODES, COLUMNS, ROWS

__all__ = ["Speed", "compared"]


@dataclass(frozen=True)
class Speed:
    """seconds: of a call, median. first: of the first one, which compiles. speedup: over
    transformers' `generate`. passes: 0 for that. recompiles: after the first picture."""

    way: str
    batch: int
    passes: float
    seconds: float
    first: float
    speedup: float
    tokens_per_second: float
    recompiles: int


def _plain(model: Any, batch: int) -> Callable[[], Any]:
    """transformers' static cache, its decode step compiled by Inductor as one graph."""
    from transformers import CompileConfig

    config: Any = CompileConfig(fullgraph=True, dynamic=False)
    config._compile_all_devices = True  # else it compiles for CUDA only
    prompts = prompt_of(torch.arange(batch) % 10)
    tokens = ROWS * (COLUMNS + 1)

    def call() -> Any:
        return model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0,
            max_new_tokens=tokens, min_new_tokens=tokens, cache_implementation="static",
            compile_config=config,
        )  # fmt: skip

    return call


def _ours(model: Any, batch: int, zipar: ZipAR) -> Callable[[], Any]:
    prompts = prompt_of(torch.arange(batch) % 10)

    def call() -> Any:
        return model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0,
            custom_generate=zipar, max_new_tokens=zipar.raster.tokens,
        )  # fmt: skip

    return call


@torch.no_grad()
def compared(
    load: Callable[[], Any], batch: int, ways: Sequence[tuple[str, Callable[..., ZipAR],
    dict[str, Any]]], repeats: int, progress: Callable[[str], None],
) -> list[Speed]:  # fmt: skip
    """Every way in turn, as often as `repeats`; each on a model of its own."""
    calls: dict[str, Callable[[], Any]] = {"transformers, compiled": _plain(load(), batch)}
    handles: dict[str, tuple[Any, ZipAR]] = {}
    for name, kind, settings in ways:
        model = load()
        zipar = kind(ROWS, COLUMNS, end_of_line=END_OF_LINE, allowed=range(CODES), **settings)
        handles[name] = model, zipar
        calls[name] = _ours(model, batch, zipar)
    first: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        started = time.perf_counter()
        call()
        first[name] = time.perf_counter() - started
        progress(f"{name}: first picture after {first[name]:.0f} s")
    before = {name: stats(model).recompiles for name, (model, _) in handles.items()}
    for _ in range(repeats):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    plain = statistics.median(seconds["transformers, compiled"])
    rows = []
    for name in calls:
        taken, passes, again = statistics.median(seconds[name]), 0.0, 0
        if name in handles:
            model, zipar = handles[name]
            assert zipar.passes is not None
            passes = float(zipar.passes.float().mean())
            again = stats(model).recompiles - before[name]
        rows.append(
            Speed(name, batch, passes, taken, first[name], plain / taken,
                  batch * ROWS * COLUMNS / taken, again)
        )  # fmt: skip
    return rows
