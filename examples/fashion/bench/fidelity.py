"""How near each method's pictures are to those of the full run, at equal cost.

Every method has the same allowance: the block evaluations of `computed` full steps. Each is tuned
(its placement of full steps, or its own settings) on noise of its own, then measured on other
noise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .... import stats
from ....kernels.predictors import PREDICTORS
from ....passes.pade.schedule import place
from ..measure import psnr
from .peers import Install, Peer, calibrate_magnitudes
from .placement import best_placement, family
from .simulate import SkippingStack
from .subjects import TUNING_SEED, Subject, final

__all__ = ["Contender", "Counted", "Fidelity", "Row"]

ALLOWANCE = 0.15  # full steps by which a method may pass the allowance


@dataclass
class Row:
    """One method at one run length.

    setting: what tuning chose. cost: block evaluations in full steps. psnr: mean over all samples
    and seeds, in dB; by_seed: the mean of each seed. error: relative L2 error, mean over seeds.
    speedup: over plain `torch.compile` with Inductor, under `torch.compile` itself; speedup_eager:
    the same without. None: not measured, or (`note`) not possible.
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
    speedup: float | None = None
    speedup_eager: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Contender:
    """How to run a tuned method again: accel's options, or another cache's installer, or plain."""

    row: Row
    pade: dict[str, Any] | None = None
    install: Install | None = None


class Counted:
    """Calls a model as diffusers' pipelines do, for the caches' sake, and counts evaluated blocks.

    model: what is called; network: what the hooks are on. count: whether to count.
    """

    def __init__(self, model: Any, network: nn.Module, steps: int, count: bool = True) -> None:
        self.model, self.network, self.steps = model, network, steps
        self.step, self.hits = 0, 0
        blocks = list(network.get_submodule("transformer_blocks").children())
        self.blocks = len(blocks)
        for block in blocks if count else ():
            block.get_submodule("attn1").register_forward_hook(self._hit)

    def _hit(self, *_: Any) -> None:
        self.hits += 1

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        from diffusers.hooks.hooks import CacheContext, HookRegistry, _set_cache_context

        step = self.step % self.steps
        if step == 0:  # as diffusers' pipelines do at the end of a run
            HookRegistry.check_if_exists_or_initialize(self.network).reset_stateful_hooks()
        context = CacheContext(
            "guided",
            step_index=step,
            sigma=1 - step / self.steps,
            num_inference_steps=self.steps,
        )
        _set_cache_context(self.network, context)
        self.step += 1
        return self.model(*inputs, **kwargs)

    @property
    def cost(self) -> float:
        """Evaluated blocks, in full steps."""
        return self.hits / self.blocks


class Fidelity:
    """One subject at one run length."""

    def __init__(self, subject: Subject, steps: int, computed: int) -> None:
        self.subject, self.steps, self.computed = subject, steps, computed
        self.plain = subject.load()
        self.tuning = subject.noise(subject.tuning, TUNING_SEED)
        self.tuned_on = final(self.plain, *self.tuning, steps)
        self.measured = [subject.noise(subject.samples, seed) for seed in range(subject.seeds)]
        self.full = [final(self.plain, *each, steps) for each in self.measured]

    def _row(self, method: str, setting: str, results: Sequence[Tensor], cost: float) -> Row:
        by_seed, errors = [], []
        for result, full in zip(results, self.full, strict=True):
            by_seed.append(round(float(psnr(result, full).mean()), 2))
            errors.append(float((result - full).norm() / full.norm()))
        return Row(
            self.subject.name, self.steps, self.computed, method, setting, round(cost, 2),
            round(sum(by_seed) / len(by_seed), 2), round(sum(errors) / len(errors), 5), by_seed,
        )  # fmt: skip

    def _tuned(self, result: Tensor) -> float:
        return float(psnr(result, self.tuned_on).mean())

    def fewer_steps(self) -> Contender:
        """The plain model on fewer steps."""
        results = [final(self.plain, *each, self.computed) for each in self.measured]
        return Contender(self._row(f"{self.computed} plain steps", "", results, self.computed))

    def accel(self, method: str, setting: str, pade: dict[str, Any]) -> Contender:
        """Through the real backend, run by torch ("eager" lowering: the same graph)."""
        torch.compiler.reset()
        options: Any = {"lowering": "eager", "pade": pade}
        fast = torch.compile(self.subject.load(), backend="accel", fullgraph=True, options=options)
        results = [final(fast, *each, self.steps) for each in self.measured]
        cost = stats(fast).full_steps / len(self.measured)
        return Contender(self._row(method, setting, results, cost), pade=pade)

    def predictor(self, name: str) -> Contender:
        """One of accel's predictors on its best placement."""
        network = self.subject.load()
        blocks = network.get_submodule("transformer_blocks")
        assert isinstance(blocks, nn.ModuleList)
        stack = SkippingStack(blocks, PREDICTORS[name])
        network.add_module("transformer_blocks", nn.ModuleList([stack]))

        def fidelity(placement: Sequence[int]) -> float:
            stack.begin(placement, self.steps)
            return self._tuned(final(network, *self.tuning, self.steps))

        placement = self._placement(self.computed, fidelity)
        # The schedule computes what follows the list's end; a last entry beyond the run stops that.
        # A step whose forecast misses by far would be computed, which costs more than allowed. What
        # is compared here is forecasts alone, without what is given back for them later.
        listed = [*placement, self.steps + 100]
        pade = {"predictor": name, "schedule": listed, "max_error": 1e9, "correction": 0.0}
        return self.accel(f"accel {name}", f"full on {list(placement)}", pade)

    def peer(self, peer: Peer) -> Contender | None:
        """Another project's cache at its best; None if no setting is within the allowance."""
        chosen = self._best_setting(peer) if peer.placed is None else self._best_placed(peer)
        if chosen is None:
            return None
        text, install = chosen
        runs = [self._with(install, *each) for each in self.measured]
        cost = sum(cost for _, cost in runs) / len(runs)
        row = self._row(peer.name, text, [result for result, _ in runs], cost)
        return Contender(row, install=install)

    def _placement(self, computed: int, fidelity: Callable[[Sequence[int]], float]) -> Any:
        shipped = place(self.steps, computed)
        others = itertools.islice(family(self.steps, computed), self.subject.placements)
        # Longer runs have more steps to move, and each matters less.
        sweeps = self.subject.sweeps if self.steps <= 20 else 0
        return best_placement(self.steps, [shipped, *others], fidelity, sweeps)[0]

    def _best_placed(self, peer: Peer) -> tuple[str, Install]:
        assert peer.placed is not None
        placed, computed = peer.placed, self.computed
        if peer.first_block:
            # Running one block on every step leaves fewer full steps.
            share = 1 / len(list(self.plain.get_submodule("transformer_blocks").children()))
            computed = int((self.computed + ALLOWANCE - self.steps * share) / (1 - share))

        def fidelity(placement: Sequence[int]) -> float:
            return self._tuned(self._with(placed(placement, self.steps), *self.tuning)[0])

        placement = self._placement(computed, fidelity)
        return f"full on {list(placement)}", placed(placement, self.steps)

    def _best_setting(self, peer: Peer) -> tuple[str, Install] | None:
        assert peer.settings is not None
        every = list(peer.settings(self.steps))
        stride = -(-len(every) // self.subject.settings)
        best: tuple[float, str, Install] | None = None
        for text, install in every[::stride]:
            result, cost = self._with(install, *self.tuning)
            got = self._tuned(result)
            if cost <= self.computed + ALLOWANCE and (best is None or got > best[0]):
                best = got, text, install
        return None if best is None else best[1:]

    def _with(self, install: Install, noise: Tensor, labels: Tensor) -> tuple[Tensor, float]:
        """A run of a fresh model with a cache on it, and what it cost."""
        network = self.subject.load()
        call = Counted(network, network, self.steps)
        with torch.no_grad():
            install(network)
        return final(call, noise, labels, self.steps), call.cost

    def magnitudes(self) -> Tensor:
        """MagCache's own calibration on the tuning noise."""
        network = self.subject.load()
        call = Counted(network, network, self.steps, count=False)
        return calibrate_magnitudes(
            network, lambda _: final(call, *self.tuning, self.steps), self.steps
        )
