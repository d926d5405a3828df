"""Programs of runs: what each run becomes beside others is what it becomes alone.

One small compiled model; samplers, forks, cancelled runs, guidance in one call and in two, and
batches whose samples change places are put together at random.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import accel
import pytest
import torch
from accel.compiler.runtime.sampling import graphs_of
from accel.tests.models import dit, noise, relative
from torch import Tensor, nn

STEPS = 14
COMPUTED = [0, 1, 3, 6, 9, 12]
BATCH = 2


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    return dit(2)


def compiled(model: nn.Module) -> Any:
    torch._dynamo.reset()
    options = {"lowering": "eager", "pade": {"schedule": COMPUTED, "max_runs": 64}}
    return torch.compile(model, backend="accel", fullgraph=True, options=options)


def forget(model: nn.Module) -> None:
    for graph, _ in graphs_of(frozenset(map(id, model.parameters()))):
        graph.models.clear()


Velocity = Callable[[Tensor, float, float], Tensor]


def guided(model: Any, label: int, fused: bool) -> Velocity:
    """Guidance towards a label; with one call for both branches, or two."""

    def call(state: Tensor, time: float, labels: Tensor) -> Tensor:
        times = torch.full((len(state),), 1000 * time)
        found: Tensor = model(state, timestep=times, class_labels=labels, return_dict=False)[0]
        return found

    def velocity(state: Tensor, time: float, weight: float) -> Tensor:
        yes, no = torch.full((len(state),), label), torch.full((len(state),), 10)
        if fused:
            both = call(torch.cat([state, state]), time, torch.cat([yes, no]))
            toward, away = both.chunk(2)
        else:
            toward, away = call(state, time, yes), call(state, time, no)
        return away + weight * (toward - away)

    return velocity


@dataclass(frozen=True)
class Request:
    """A run that has not ended. weights: of guidance, step by step, so far and from now on."""

    seed: int
    label: int
    fused: bool
    sampler: str
    weights: tuple[float, ...] = ()
    state: Tensor = field(default_factory=lambda: torch.zeros(0))
    before: Tensor | None = None

    @staticmethod
    def begun(seed: int, label: int, fused: bool, sampler: str) -> Request:
        return Request(seed, label, fused, sampler, state=noise(BATCH, seed=seed))

    @torch.no_grad()
    def stepped(self, model: Any, weight: float) -> Request:
        """After one step of its sampler."""
        velocity = guided(model, self.label, self.fused)
        step, gap = len(self.weights), 0.3 / STEPS
        time, after = 1 - step / STEPS, 1 - (step + 1) / STEPS
        now = velocity(self.state, time, weight)
        used = now
        if self.sampler == "heun" and after > 0:
            used = (now + velocity(self.state - gap * now, after, weight)) / 2
        elif self.sampler == "two-step" and self.before is not None:
            used = 1.5 * now - 0.5 * self.before
        return replace(
            self, state=self.state - gap * used, before=now, weights=(*self.weights, weight)
        )

    def alone(self, model: Any) -> Request:
        """The same run with nothing beside it."""
        forget(model)
        run = Request.begun(self.seed, self.label, self.fused, self.sampler)
        for weight in self.weights:
            run = run.stepped(model, weight)
        return run


def program(model: Any, pick: random.Random, length: int) -> list[Request]:
    """Runs that begin, go on, fork and are left, in any order."""
    fused = pick.random() < 0.5  # all alike: another batch is another graph, with runs of its own
    kinds = [(seed, label, fused, sampler) for seed in (1, 2) for label in (3, 4)
             for sampler in ("euler", "heun", "two-step")]  # fmt: skip
    chosen = pick.sample(kinds, 4)
    # Those that share all but the guidance's weight are hardest to tell apart.
    chosen.append(chosen[0])
    live = [(Request.begun(*kind), pick.choice([1.0, 2.0, 4.0])) for kind in chosen]
    for _ in range(length):
        index = pick.randrange(len(live))
        run, weight = live[index]
        event = pick.random()
        if event < 0.06 and run.weights:
            live.append((run, pick.choice([1.0, 3.0, 6.0])))  # a fork
        elif event < 0.1:
            live[index] = Request.begun(*pick.choice(kinds)), weight  # a cancelled run, and another
        elif len(run.weights) < STEPS:
            live[index] = run.stepped(model, weight), weight
    return [run for run, _ in live if run.weights]


@pytest.mark.parametrize("seed", range(6))
def test_runs_beside_each_other_are_what_they_are_alone(seed: int, plain: nn.Module) -> None:
    fast = compiled(plain)
    runs = program(fast, random.Random(seed), 60)
    stats = accel.stats(fast)
    assert stats.predicted_steps > 10
    for run in runs:
        alone = run.alone(fast)
        assert relative(run.state, alone.state) < 1e-5
    # Nothing is proven by the skin of its teeth.
    assert stats.largest_accepted < 40
    assert stats.smallest_refused > 500


def test_samples_of_a_batch_may_change_places(plain: nn.Module) -> None:
    """And be copied over others, as resampling does, and be joined by new ones."""
    fast = compiled(plain)

    @torch.no_grad()
    def stepped(state: Tensor, labels: Tensor, step: int) -> Tensor:
        times = torch.full((len(state),), 1000 * (1 - step / STEPS))
        out: Tensor = fast(state, timestep=times, class_labels=labels, return_dict=False)[0]
        return state - out * 0.3 / STEPS

    labels = torch.tensor([1, 2, 3])
    wanted = state = noise(3)
    for step in range(STEPS):
        wanted = stepped(wanted, labels, step)
    expected = accel.stats(fast).predicted_steps
    forget(plain)
    order = torch.arange(3)
    for step in range(STEPS):
        turned = torch.randperm(3)
        order, state = order[turned], state[turned]
        state = stepped(state, labels[order], step)
    assert relative(state, wanted[order]) < 1e-5
    stats = accel.stats(fast)
    assert stats.predicted_steps == expected > 5
    assert stats.runs == 1

    forget(plain)
    alone = state = noise(3)
    same = torch.tensor([1, 1, 1])
    for step in range(STEPS):
        alone = stepped(alone, same, step)
    forget(plain)
    for step in range(STEPS):
        if step == 5:
            state = state[torch.tensor([0, 0, 2])]
        state = stepped(state, same, step)
    assert relative(state, alone[torch.tensor([0, 0, 2])]) < 1e-5
    assert accel.stats(fast).predicted_steps == expected

    forget(plain)
    state = noise(3)
    for step in range(4):
        state = stepped(state, labels, step)
    before = accel.stats(fast)
    state[1] = noise(1, seed=9)[0]  # leaves, and another takes its place
    for step in range(4, 6):
        state = stepped(state, labels, step)
    after = accel.stats(fast)
    assert after.full_steps > before.full_steps
    assert after.runs == 2
