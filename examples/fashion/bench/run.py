"""The bench itself.

accel bench pade

Every method has the same allowance: the block evaluations of `computed` full steps. Each is tuned
(its placement of full steps, or its own settings) on noise of its own, then measured on other
noise: true PSNR and relative error to the full run of the same length.
"""

from __future__ import annotations

import gc
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .... import stats
from ....kernels.predictors import PREDICTORS
from .. import model as fashion
from ..measure import psnr
from .peers import Install, Peer, calibrate_magnitudes, peers
from .placement import best_placement
from .simulate import SkippingStack

__all__ = ["LENGTHS", "SUBJECTS", "Row", "Subject", "run"]

LENGTHS = ((20, 8), (30, 12), (50, 20))  # steps of a run, full steps that it may cost
ALLOWANCE = 0.1  # full steps by which a method may pass the allowance: block 1 of 12, about
TUNING_SEED = 999
SKIPPED = {"taylor-1"}  # the same as "linear"


@dataclass(frozen=True)
class Subject:
    """A model to measure on. shape: one sample's; tuning: samples to tune on."""

    name: str
    load: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tuning: int

    def noise(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, *self.shape, generator=generator), torch.arange(count) % 10


def random_dit_b2() -> nn.Module:
    """diffusers' DiT in the size B/2 with random weights, 16x16 latents."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    network: Any = DiTTransformer2DModel(
        num_attention_heads=12,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        num_layers=12,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    return network.eval()


SUBJECTS = {
    "reference": Subject("reference", fashion.load, (1, 28, 28), tuning=12),
    "random-dit-b2": Subject("random-dit-b2", random_dit_b2, (4, 16, 16), tuning=2),
}


@dataclass
class Row:
    """One method at one run length.

    setting: what tuning chose. cost: block evaluations in full steps. psnr: mean over all samples
    and seeds, in dB; by_seed: the mean of each seed. error: relative L2 error, mean.
    """

    subject: str
    steps: int
    computed: int
    method: str
    setting: str
    cost: float
    psnr: float
    error: float
    by_seed: list[float] = field(default_factory=list)


class _Counted:
    """Calls a model, counts its evaluated blocks, and tells diffusers' hooks which step it is."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], steps: int) -> None:
        self.model, self.steps, self.step, self.hits = model, steps, 0, 0
        self.count = len(blocks)
        for block in blocks:
            attention = block.get_submodule("attn1")
            attention.register_forward_hook(self._hit)

    def _hit(self, *_: Any) -> None:
        self.hits += 1

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        from diffusers.hooks.hooks import CacheContext, _set_cache_context

        context = CacheContext(
            "guided",
            step_index=self.step,
            sigma=1 - self.step / self.steps,
            num_inference_steps=self.steps,
        )
        _set_cache_context(self.model, context)
        self.step += 1
        return self.model(*inputs, **kwargs)

    @property
    def cost(self) -> float:
        return self.hits / self.count


def _final(call: Any, noise: Tensor, labels: Tensor, steps: int) -> Tensor:
    state = noise
    for latest in fashion.sample(call, noise, labels, steps=steps):
        state = latest
    return state


class _Bench:
    """One subject at one run length."""

    def __init__(self, subject: Subject, steps: int, computed: int, samples: int, seeds: int):
        self.subject, self.steps, self.computed = subject, steps, computed
        self.plain = subject.load()
        self.tuning = subject.noise(subject.tuning, TUNING_SEED)
        self.tuned_on = _final(self.plain, *self.tuning, steps)
        self.measured = [subject.noise(samples, seed) for seed in range(seeds)]
        self.full = [_final(self.plain, *each, steps) for each in self.measured]

    def row(self, method: str, setting: str, results: Sequence[Tensor], cost: float) -> Row:
        by_seed, errors = [], []
        for result, full in zip(results, self.full, strict=True):
            by_seed.append(round(float(psnr(result, full).mean()), 2))
            errors.append(float((result - full).norm() / full.norm()))
        return Row(
            self.subject.name, self.steps, self.computed, method, setting, round(cost, 2),
            round(sum(by_seed) / len(by_seed), 2), round(sum(errors) / len(errors), 5), by_seed,
        )  # fmt: skip

    def fewer_steps(self) -> Row:
        results = [_final(self.plain, *each, self.computed) for each in self.measured]
        return self.row(f"{self.computed} plain steps", "", results, self.computed)

    def accel(self, method: str, setting: str, pade: dict[str, Any]) -> Row:
        """Through the real backend, run by torch ("eager" lowering: the same graph)."""
        torch.compiler.reset()
        options: Any = {"lowering": "eager", "pade": pade}
        fast = torch.compile(self.subject.load(), backend="accel", fullgraph=True, options=options)
        results = [_final(fast, *each, self.steps) for each in self.measured]
        cost = stats(fast).full_steps / len(self.measured)
        return self.row(method, setting, results, cost)

    def predictor(self, name: str) -> Row:
        network = self.subject.load()
        blocks = network.get_submodule("transformer_blocks")
        assert isinstance(blocks, nn.ModuleList)
        stack = SkippingStack(blocks, PREDICTORS[name])
        network.add_module("transformer_blocks", nn.ModuleList([stack]))

        def fidelity(placement: Sequence[int]) -> float:
            stack.begin(placement, self.steps)
            state = _final(network, *self.tuning, self.steps)
            return float(psnr(state, self.tuned_on).mean())

        sweeps = 2 if self.steps <= 20 else 1
        placement, _ = best_placement(self.steps, self.computed, fidelity, sweeps)
        # The schedule computes what follows the list's end; a last entry beyond the run stops that.
        listed = [*placement, self.steps + 100]
        pade = {"predictor": name, "schedule": listed}
        return self.accel(f"accel {name}", f"full on {list(placement)}", pade)

    def peer(self, peer: Peer) -> Row | None:
        best: tuple[float, str, Install] | None = None
        for text, install in peer.settings(self.steps, self.computed):
            result, cost = self._with(install, *self.tuning)
            got = float(psnr(result, self.tuned_on).mean())
            if cost <= self.computed + ALLOWANCE and (best is None or got > best[0]):
                best = got, text, install
        if best is None:
            return None
        runs = [self._with(best[2], *each) for each in self.measured]
        cost = sum(cost for _, cost in runs) / len(runs)
        return self.row(peer.name, best[1], [result for result, _ in runs], cost)

    def _with(self, install: Install, noise: Tensor, labels: Tensor) -> tuple[Tensor, float]:
        """A run of a fresh model with a cache on it, and what it cost."""
        network = self.subject.load()
        blocks = list(network.get_submodule("transformer_blocks").children())
        with torch.no_grad():
            install(network)
        call = _Counted(network, blocks, self.steps)
        return _final(call, noise, labels, self.steps), call.cost

    def magnitudes(self) -> Tensor:
        network = self.subject.load()
        call = _Counted(network, [], self.steps)
        return calibrate_magnitudes(
            network, lambda _: _final(call, *self.tuning, self.steps), self.steps
        )


def run(
    output: Path,
    *,
    subject: str = "reference",
    lengths: Sequence[tuple[int, int]] = LENGTHS,
    samples: int = 64,
    seeds: int = 3,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Measure everything; write `pade-<subject>.json`, `.md` and `.png` into `output`.

    progress(text) is told what is being measured, and each result.
    """
    rows: list[Row] = []

    def add(row: Row | None, name: str) -> None:
        if row is None:
            progress(f"{name}: no setting within the allowance")
            return
        rows.append(row)
        progress(f"{row.steps} steps, {row.method}: {row.psnr} dB at {row.cost} ({row.setting})")
        gc.collect()

    for steps, computed in lengths:
        bench = _Bench(SUBJECTS[subject], steps, computed, samples, seeds)
        add(bench.fewer_steps(), "plain")
        shipped = {"preset": "balanced"}
        add(bench.accel("accel as shipped", 'preset "balanced"', shipped), "accel as shipped")
        for name in PREDICTORS:
            if name not in SKIPPED:
                add(bench.predictor(name), name)
        for peer in peers(bench.magnitudes()):
            add(bench.peer(peer), peer.name)
        _write(output, subject, samples, seeds, rows)
    return rows


def _write(output: Path, subject: str, samples: int, seeds: int, rows: Sequence[Row]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    record = {
        "subject": subject, "samples": samples, "seeds": seeds, "torch": torch.__version__,
        "processor": platform.machine(), "threads": torch.get_num_threads(),
        "rows": [asdict(row) for row in rows],
    }  # fmt: skip
    (output / f"pade-{subject}.json").write_text(json.dumps(record, indent=1) + "\n")
    (output / f"pade-{subject}.md").write_text(table(rows))
    _draw(output / f"pade-{subject}.png", rows)


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, best first within each run length."""
    lines = []
    for steps, computed in dict.fromkeys((row.steps, row.computed) for row in rows):
        lines += [
            f"### {steps} steps at the cost of {computed}", "",
            "| method | PSNR (dB) | by seed | relative error | cost in full steps | tuned to |",
            "|---|---|---|---|---|---|",
        ]  # fmt: skip
        group = [row for row in rows if row.steps == steps]
        for row in sorted(group, key=lambda row: -row.psnr):
            seeds = " / ".join(f"{value:.1f}" for value in row.by_seed)
            lines.append(
                f"| {row.method} | {row.psnr:.1f} | {seeds} | {row.error:.2%} | {row.cost:g} "
                f"| {row.setting} |"
            )
        lines.append("")
    return "\n".join(lines)


def _draw(path: Path, rows: Sequence[Row]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = list(dict.fromkeys((row.steps, row.computed) for row in rows))
    figure, axes = pyplot.subplots(1, len(lengths), figsize=(6 * len(lengths), 6), squeeze=False)
    for axis, (steps, computed) in zip(axes[0], lengths, strict=True):
        group = sorted((row for row in rows if row.steps == steps), key=lambda row: row.psnr)
        colours = ["tab:blue" if row.method.startswith("accel") else "tab:grey" for row in group]
        axis.barh([row.method for row in group], [row.psnr for row in group], color=colours)
        axis.set_title(f"{steps} steps at the cost of {computed}")
        axis.set_xlabel("PSNR to the full run (dB)")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
