"""What samplers make of outputs, found by trying them out; and the same, proven from samples."""

from __future__ import annotations

import math
from typing import Any

import accel
import diffusers
import pytest
import torch
from accel.compiler.models.schedulers import weights_of
from accel.compiler.runtime.origins import weigh
from accel.compiler.runtime.steps import Call, Evaluation, Sample, Step
from accel.tests.models import dit

STEPS = 12
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FIRST_ORDER: dict[str, Any] = {
    "flow": ("FlowMatchEulerDiscreteScheduler", {}),
    "shifted flow": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "DDIM": ("DDIMScheduler", {"clip_sample": False, **STABLE}),
    "DDIM, velocity": ("DDIMScheduler", {"clip_sample": False, "prediction_type": "v_prediction"}),
    "DPM++ of first order": ("DPMSolverMultistepScheduler", {"solver_order": 1}),
    "Euler": ("EulerDiscreteScheduler", STABLE),
}
OTHERS: dict[str, Any] = {
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {**FLOW, "flow_shift": 3.0}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "noise at each step": ("EulerAncestralDiscreteScheduler", {}),
    "clipped": ("DDIMScheduler", {}),
}


def scheduler(kind: str, config: dict[str, Any], steps: int = STEPS) -> Any:
    made = getattr(diffusers, kind)(**config)
    made.set_timesteps(steps)
    return made


@pytest.mark.parametrize("name", ["flow", "shifted flow"])
def test_a_flow_adds_its_outputs_times_its_steps(name: str) -> None:
    sampler = scheduler(*FIRST_ORDER[name])
    found = weights_of(sampler)
    assert found is not None
    torch.testing.assert_close(torch.tensor(found), sampler.sigmas.diff(), rtol=1e-4, atol=1e-7)


def test_ddim_adds_its_outputs_times_what_noise_and_signal_change_by() -> None:
    """DDIM's x / alpha gains the noise times the rise of sigma / alpha."""
    sampler = scheduler(*FIRST_ORDER["DDIM"])
    kept = sampler.alphas_cumprod[sampler.timesteps]
    kept = torch.cat([kept, torch.ones(1)])
    weights = weights_of(sampler)
    assert weights is not None
    expected = ((1 - kept) / kept).sqrt().diff() * kept[0].sqrt()
    torch.testing.assert_close(torch.tensor(weights), expected, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("name", OTHERS)
def test_samplers_that_use_more_than_the_newest_output_say_nothing(name: str) -> None:
    assert weights_of(scheduler(*OTHERS[name])) is None


class Strange:
    """Of another project."""

    timesteps = (3, 2, 1)

    def step(self, output: Any, time: int, sample: Any) -> Any:
        """Draws from the process's own random numbers."""
        return sample + output + torch.randn(1)


class Failing(Strange):
    def step(self, output: Any, time: int, sample: Any, generator: Any = None) -> Any:
        raise RuntimeError("not like this")


@pytest.mark.parametrize("kind", [Strange, Failing])
def test_what_can_t_be_tried_out_says_nothing_and_draws_nothing(kind: Any) -> None:
    before = torch.get_rng_state()
    assert weights_of(kind()) is None
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("given", "message"),
    [(scheduler(*FIRST_ORDER["flow"]), "has 12 timesteps, but steps is 20"),
     (torch.nn.Linear(2, 2), "is a Linear; it has to be one of diffusers'")],
)  # fmt: skip
def test_what_does_not_fit_is_named(given: Any, message: str) -> None:
    model = torch.compile(dit(), backend="accel")
    said = accel.trajectory(model, steps=20, scheduler=given)
    with pytest.raises(accel.OptionError, match=message):
        said.__enter__()


@pytest.mark.parametrize("name", [*FIRST_ORDER, *OTHERS])
def test_nothing_is_changed_by_looking(name: str) -> None:
    """Neither the sampler, in the middle of a run, nor any random number."""
    config = {**FIRST_ORDER, **OTHERS}[name]
    runs = []
    for looked in (False, True):
        torch.manual_seed(3)
        sampler = scheduler(*config)
        sample = torch.randn(1, 2, 3)
        for number, time in enumerate(sampler.timesteps):
            if looked and number in (0, 3):
                weights_of(sampler)
            if hasattr(sampler, "scale_model_input"):
                sampler.scale_model_input(sample, time)
            sample = sampler.step(sample.tanh(), time, sample, return_dict=False)[0]
        runs.append(sample)
    assert torch.equal(*runs)


def test_a_run_that_begins_with_a_picture() -> None:
    """Pipelines tell the sampler the index to begin at; weights are of all steps."""
    sampler, begun = (scheduler(*FIRST_ORDER["shifted flow"]) for _ in range(2))
    begun.set_begin_index(5)
    assert weights_of(begun) == weights_of(sampler)


def step_of(sample: torch.Tensor, parent: Step | None) -> Step:
    depth = 0 if parent is None else parent.depth + 1
    values = Sample((sample.flatten(),), f"{depth}".encode())
    return Step(values, (), parent, depth, 0)


def proven(sampler: Any, guidance: float) -> list[list[float]]:
    """Weights of both branches' outputs at each step but the last, from samples alone."""
    draw = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 32, 32, generator=draw) * getattr(sampler, "init_noise_sigma", 1.0)
    step: Step | None = None
    found = []
    for time in sampler.timesteps:
        before, step = step, step_of(sample, step)
        call = Call((), [step.sample], [()], frozenset(), torch.float32)
        weigh(call, [step])
        if before is not None:
            found.append([step.weights.get(each, math.nan) for each in (("told",), ("untold",))])
        told, untold = (torch.tanh(sample.roll(shift, -1) * 0.7 + shift) for shift in (1, 2))
        for name, output in (("told", told), ("untold", untold)):
            evaluation = Evaluation(step, None, 0, (name,), None, frozenset(), frozenset())
            evaluation.outputs = (output.flatten(),)
            step.evaluations.append(evaluation)
        if hasattr(sampler, "scale_model_input"):
            sampler.scale_model_input(sample, time)
        mixed = untold + guidance * (told - untold)
        sample = sampler.step(mixed, time, sample, return_dict=False)[0]
    return found


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_what_is_proven_from_samples_is_what_the_sampler_does(name: str) -> None:
    guidance = 3.0
    expected = weights_of(scheduler(*FIRST_ORDER[name]))
    assert expected is not None
    *but_the_last, _ = expected
    for (told, untold), weight in zip(
        proven(scheduler(*FIRST_ORDER[name]), guidance), but_the_last, strict=True
    ):
        assert told == pytest.approx(guidance * weight, rel=0.02)
        assert untold == pytest.approx((1 - guidance) * weight, rel=0.02)


@pytest.mark.parametrize("name", ["DPM++ 2M", "UniPC"])
def test_of_samplers_of_higher_order_no_weight_is_proven(name: str) -> None:
    """But for their first step, which is of first order, having nothing but its own output."""
    first, *later = proven(scheduler(*OTHERS[name]), 3.0)
    assert not any(math.isnan(each) for each in first)
    assert all(math.isnan(each) for step in later for each in step)
