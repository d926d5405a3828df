"""What predicted steps missed is given back, whichever way the sampler's weights became known."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import accel
import pytest
import torch
from accel.compiler.models.schedulers import weights_of
from accel.passes import PadePass
from accel.tests.models import dit, noise
from torch import Tensor

STEPS, COMPUTED = 12, (0, 1, 3, 5, 8)
LABELS = torch.tensor([3, 5])


def scheduler(shift: float) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    made: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    made.set_timesteps(sigmas=[1 - step / STEPS for step in range(STEPS)])
    return made


def fast(correction: float, seed: int = 0) -> Any:
    pade = {"schedule": list(COMPUTED), "correction": correction, "max_error": 1e9}
    model = dit(seed=seed)
    return torch.compile(model, backend="accel", options={"lowering": "eager", "pade": pade})


@torch.no_grad()
def sampled(
    call: Callable[..., Any],
    shift: float,
    guidance: float = 1.0,
    weaker: Callable[..., Any] | None = None,
) -> Tensor:
    """One run; with guidance in two calls where that is not 1: by no label, or a weaker model."""
    sampler, sample = scheduler(shift), noise()
    calls = [(call, LABELS)]
    if guidance != 1.0:
        calls.append((call, torch.full((2,), 10)) if weaker is None else (weaker, LABELS))
    for time in sampler.timesteps:
        times = time.expand(len(sample))
        outputs = [
            each(sample, timestep=times, class_labels=labels, return_dict=False)
            for each, labels in calls
        ]
        told, untold = outputs[0][0], outputs[-1][0]
        mixed = untold + guidance * (told - untold)
        sample = sampler.step(mixed, time, sample, return_dict=False)[0]
    return sample


class ByHand:
    """A model without correction, and the correction around it, in plain numbers."""

    def __init__(self, shift: float, branches: int, seed: int = 0) -> None:
        self.model, self.branches, self.calls = fast(0.0, seed), branches, 0
        sampler = scheduler(shift)
        self.times, self.weights = sampler.timesteps.tolist(), weights_of(sampler) or []
        self.computed: list[tuple[int, Tensor]] = [(0, torch.zeros(1))] * branches
        self.predicted: list[dict[int, Tensor]] = [{} for _ in range(branches)]

    def __call__(self, *inputs: Any, **named: Any) -> tuple[Tensor]:
        step, branch = divmod(self.calls, self.branches)
        self.calls += 1
        (answer,) = self.model(*inputs, **named)
        if step not in COMPUTED:
            self.predicted[branch][step] = answer
            return (answer,)
        begun, first = self.computed[branch]
        missed = torch.zeros_like(answer)
        for each, guess in self.predicted[branch].items():
            span = self.times[step] - self.times[begun]
            along = (self.times[each] - self.times[begun]) / span
            between = first + along * (answer - first)
            missed += self.weights[each] / self.weights[step] * (between - guess)
        self.computed[branch], self.predicted[branch] = (step, answer), {}
        return (answer + 0.5 * (1 - 1 / (STEPS - step)) * missed,)


@pytest.mark.parametrize(
    ("how", "shift", "guidance"),
    [
        ("samples", 1.0, 1.0),
        ("samples", 1.0, 3.0),
        ("steps", 1.0, 3.0),
        ("scheduler", 1.0, 1.0),
        ("scheduler", 3.0, 1.0),
        ("scheduler", 3.0, 3.0),
    ],
)
def test_as_by_hand(how: str, shift: float, guidance: float) -> None:
    model = fast(0.5)
    by_hand = ByHand(shift, 1 if guidance == 1.0 else 2)
    expected = sampled(by_hand, shift, guidance)
    said = {
        "samples": nullcontext(),
        "steps": accel.trajectory(model, steps=STEPS),
        "scheduler": accel.trajectory(model, scheduler=scheduler(shift)),
    }
    with said[how]:
        got = sampled(model, shift, guidance)
    assert accel.stats(model).full_steps == accel.stats(by_hand.model).full_steps
    # Of each branch: all computed steps but the first two, between which nothing was predicted.
    corrected = (len(COMPUTED) - 2) * by_hand.branches
    assert accel.stats(model).corrected_steps == corrected
    assert accel.stats(by_hand.model).corrected_steps == 0
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    uncorrected = sampled(fast(0.0), shift, guidance)
    assert (got - uncorrected).abs().max() > 1e-3


def test_guidance_by_another_model() -> None:
    """Each of the two has seen but its own outputs."""
    by_hand = ByHand(1.0, 1), ByHand(1.0, 1, seed=7)
    expected = sampled(by_hand[0], 1.0, 3.0, by_hand[1])
    torch.testing.assert_close(
        sampled(fast(0.5), 1.0, 3.0, fast(0.5, seed=7)), expected, rtol=1e-4, atol=1e-4
    )
    uncorrected = sampled(fast(0.0), 1.0, 3.0, fast(0.0, seed=7))
    assert (uncorrected - expected).abs().max() > 1e-3


def test_a_caller_that_writes_into_its_answer_changes_no_later_one() -> None:
    model = fast(0.5)
    alone = sampled(model, 1.0)

    fresh, given = fast(0.5), list[Tensor]()

    def writing(*inputs: Any, **named: Any) -> tuple[Tensor]:
        if given:
            given.pop().fill_(7.0)
        (answer,) = fresh(*inputs, **named)
        given.append(answer)
        return (answer.clone(),)

    torch.testing.assert_close(sampled(writing, 1.0), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan")])
def test_shares_that_are_none(wrong: float) -> None:
    with pytest.raises(accel.OptionError, match="correction"):
        PadePass(correction=wrong)
