"""`accel.accelerate`: whole pipelines of diffusers that say themselves where in a run a call is."""

from __future__ import annotations

import threading
from typing import Any

import accel
import pytest
import torch
from accel import AccelError, OptionError
from accel.compiler.runtime import reading, sampling
from torch import Tensor, nn

from ...models import relative
from ..test_pipelines import STEPS, class_pipeline, flux, flux_pipeline

EAGER = {"lowering": "eager", "verify": True}


def classes(
    pipeline: Any, seed: int = 0, labels: tuple[int, ...] = (3, 5), steps: int = STEPS
) -> Tensor:
    result = pipeline(
        list(labels), guidance_scale=1.5, num_inference_steps=steps, output_type="pt",
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    return torch.as_tensor(result.images)


def counts(pipeline: Any) -> tuple[int, int]:
    stats = accel.stats(pipeline.transformer)
    return stats.full_steps, stats.predicted_steps


@pytest.mark.parametrize("guided", [False, True])
def test_always_compute_is_the_plain_pipeline(guided: bool) -> None:
    expected = flux(flux_pipeline(), guided=guided)
    always = accel.accelerate(flux_pipeline(), **EAGER, pade={"schedule": "full"})
    torch.testing.assert_close(flux(always, guided=guided), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guided", [False, True])
def test_what_the_plan_says_is_computed(guided: bool) -> None:
    """And nothing is read: neither samples nor conditions."""
    expected = flux(flux_pipeline(), guided=guided)
    fast = accel.accelerate(flux_pipeline(), **EAGER)
    for run in (1, 2):
        assert 0 < relative(flux(fast, guided=guided), expected) < 0.05
        branches = 1 + guided
        assert counts(fast) == (8 * run * branches, 12 * run * branches)
    stats = accel.stats(fast.transformer)
    assert (stats.host_reads, stats.state_bytes, stats.unmatched_calls) == (0, 0, 0)
    assert stats.runs == 2 * (1 + guided)


def test_no_tensor_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = accel.accelerate(flux_pipeline(), **EAGER)

    def refused(*args: Any) -> Any:
        raise AssertionError("something was read")

    monkeypatch.setattr(reading, "on_host", refused)
    monkeypatch.setattr(reading, "parts_of", refused)
    flux(fast, guided=True)
    assert counts(fast) == (16, 24)


def test_another_prompt_size_seed_and_length() -> None:
    fast = accel.accelerate(flux_pipeline(), **EAGER)
    for size, prompt in ((16, 0), (24, 0), (24, 1), (16, 1)):
        alone = flux(accel.accelerate(flux_pipeline(), **EAGER), size=size, prompt=prompt)
        torch.testing.assert_close(
            flux(fast, size=size, prompt=prompt), alone, rtol=1e-3, atol=1e-4
        )
    pictures = accel.accelerate(class_pipeline(), **EAGER)
    for seed, labels, steps in ((0, (3, 5), 20), (1, (3, 5), 20), (1, (7,), 12), (2, (1, 2, 3), 8)):
        fresh = accel.accelerate(class_pipeline(), **EAGER)
        got, alone = (classes(each, seed, labels, steps) for each in (pictures, fresh))
        torch.testing.assert_close(got, alone, rtol=1e-3, atol=1e-4)


def test_a_first_run_knows_its_length() -> None:
    """DDIM's times say 19 of 20 steps; the pipeline knows."""
    fast = accel.accelerate(class_pipeline(), **EAGER)
    assert relative(classes(fast), classes(class_pipeline())) < 0.05
    assert counts(fast) == (8, 12)


def test_a_sampler_that_adds_noise_skips_too() -> None:
    """Nothing could prove its steps."""
    from diffusers import EulerAncestralDiscreteScheduler

    plain, fast = class_pipeline(), class_pipeline()
    for each in (plain, fast):
        each.scheduler = EulerAncestralDiscreteScheduler()
    accel.accelerate(fast, **EAGER, pade={"max_error": 1e9})
    assert relative(classes(fast), classes(plain)) < 0.3
    assert counts(fast) == (8, 12)


def test_another_scheduler_afterwards() -> None:
    from diffusers import DPMSolverMultistepScheduler

    fast, fresh = (accel.accelerate(class_pipeline(), **EAGER) for _ in range(2))
    classes(fast)
    for each in (fast, fresh):
        each.scheduler = DPMSolverMultistepScheduler()
    torch.testing.assert_close(classes(fast), classes(fresh), rtol=1e-3, atol=1e-4)
    assert counts(fresh) == (8, 12)


def test_a_cancelled_run_leaves_nothing() -> None:
    fast, fresh = (accel.accelerate(flux_pipeline(), **EAGER) for _ in range(2))

    class CancelledError(Exception):
        pass

    def cancel(pipeline: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 6:
            raise CancelledError
        return given

    with pytest.raises(CancelledError):
        flux(fast, callback_on_step_end=cancel)
    assert accel.stats(fast.transformer).state_bytes == 0
    torch.testing.assert_close(flux(fast), flux(fresh), rtol=1e-3, atol=1e-4)


def test_weights_that_change_in_a_run_are_computed_with() -> None:
    pipeline = accel.accelerate(flux_pipeline(), **EAGER)
    seen = []

    def change(given: Any, step: int, time: Any, more: dict[str, Any]) -> dict[str, Any]:
        seen.append(accel.stats(given.transformer).full_steps)
        if step == 9:
            with torch.no_grad():
                given.transformer.transformer_blocks[0].ff.net[2].weight.mul_(1.1)
        return more

    flux(pipeline, callback_on_step_end=change)
    assert seen[10] == seen[9] + 1
    assert accel.stats(pipeline.transformer).weight_changes == 1


def test_release() -> None:
    pipeline = flux_pipeline()
    kinds = type(pipeline), type(pipeline.scheduler)
    expected = flux(pipeline)
    assert accel.accelerate(pipeline, **EAGER) is pipeline
    assert isinstance(pipeline, kinds[0])
    assert type(pipeline).__name__ == kinds[0].__name__
    flux(pipeline)
    before = counts(pipeline)
    assert accel.release(pipeline) is pipeline
    assert (type(pipeline), type(pipeline.scheduler)) == kinds
    assert "cache_context" not in vars(pipeline.transformer)
    torch.testing.assert_close(flux(pipeline), expected)
    assert counts(pipeline) == before
    with pytest.raises(AccelError, match="FluxPipeline is not accelerated"):
        accel.release(pipeline)


def test_release_gives_back_what_was_there() -> None:
    """A transformer that its user had compiled, and one that has been replaced since."""
    pipeline = flux_pipeline()
    mine = pipeline.transformer
    mine.compile(backend="eager")
    compiled = mine._compiled_call_impl
    accel.accelerate(pipeline, **EAGER)
    assert mine._compiled_call_impl is not compiled
    other = flux_pipeline().transformer
    other.compile(backend="eager")
    others = other._compiled_call_impl
    pipeline.transformer = other
    accel.release(pipeline)
    assert mine._compiled_call_impl is compiled
    assert other._compiled_call_impl is others


def test_what_a_device_left_is_taken_in_when_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on another device, which nothing waits for: judged late, and not piled up."""
    monkeypatch.setattr(sampling, "at_hand", lambda tensors: False)
    fast = accel.accelerate(flux_pipeline(), **EAGER)
    flux(fast)
    assert counts(fast) == (8, 12)
    ((_, model),) = sampling.graphs_of(frozenset(map(id, fast.transformer.parameters())))
    assert len(model.unread) <= 1
    assert 0 < accel.stats(fast.transformer).last_error < 1


def test_once_more_with_other_options() -> None:
    pipeline = accel.accelerate(flux_pipeline(), **EAGER)
    flux(pipeline)
    accel.accelerate(pipeline, **EAGER, pade={"preset": "fast", "max_error": 1e9})
    before = counts(pipeline)
    flux(pipeline)
    assert counts(pipeline) == (before[0] + 6, before[1] + 14)


def test_two_pipelines_share_a_transformer() -> None:
    from diffusers import FluxImg2ImgPipeline

    first = flux_pipeline()
    second = FluxImg2ImgPipeline(**first.components)
    accel.accelerate(first, **EAGER)
    accel.accelerate(second, **EAGER)
    accel.release(second)
    flux(first)
    assert counts(first) == (8, 12)


class Bare:
    """Something with components."""

    def __init__(self, **components: Any) -> None:
        self.components = components


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (nn.Linear(2, 2), "expected a pipeline of diffusers, with components, got Linear"),
        (Bare(unet=nn.Linear(2, 2)), "Bare has no transformer; it has unet: Linear"),
        (Bare(), "it has no models yet"),
        (Bare(transformer=nn.Linear(2, 2)), "Bare has NoneType for a scheduler"),
    ],
)
def test_what_can_t_be_served_is_named(given: Any, message: str) -> None:
    with pytest.raises(AccelError, match=message):
        accel.accelerate(given)


def test_bad_options_change_nothing() -> None:
    pipeline = flux_pipeline()
    kind = type(pipeline)
    with pytest.raises(OptionError, match="unknown"):
        accel.accelerate(pipeline, pad={"preset": "fast"})
    assert type(pipeline) is kind


def test_branches_of_a_loop_of_one_s_own() -> None:
    """Named, and told apart by nothing else: both have the same conditions."""
    model = class_pipeline().transformer
    options = {**EAGER, "pade": {"max_error": 1e9}}
    fast = torch.compile(model, backend="accel", options=options)
    labels = torch.tensor([1])

    def sampled() -> Tensor:
        torch.manual_seed(0)
        state = torch.randn(1, 4, 8, 8)
        with torch.no_grad(), accel.trajectory(fast, steps=STEPS):
            for step in range(STEPS):
                time = torch.full((1,), 1000 * (1 - step / STEPS))
                outputs = []
                for name, shift in (("one", 0.0), ("other", 0.5)):
                    with accel.trajectory(fast, branch=name):
                        out = fast(state + shift, timestep=time, class_labels=labels).sample
                    outputs.append(out[:, :4])
                state = state - sum(outputs) * 0.02
        return state

    assert sampled().isfinite().all()
    assert accel.stats(fast).predicted_steps == 2 * 12


def test_a_branch_is_of_a_run() -> None:
    model = class_pipeline().transformer
    with (
        pytest.raises(OptionError, match="branch 'cond' is of no run"),
        accel.trajectory(model, branch="cond"),
    ):
        pass


@pytest.mark.parametrize("changed", [False, True])
def test_weights_that_change_are_noticed_in_every_explicit_run(changed: bool) -> None:
    """Also by a run that is open while a call of another thread is what finds the change."""
    model = class_pipeline().transformer
    fast = torch.compile(model, backend="accel", options={**EAGER, "pade": {"max_error": 1e9}})
    labels, state = torch.tensor([1]), torch.randn(1, 4, 8, 8)

    def call(step: int) -> None:
        times = torch.full((1,), 1000.0 - 50 * step)
        with torch.no_grad():
            fast(state * (1 - 0.02 * step), timestep=times, class_labels=labels)

    with torch.no_grad(), accel.trajectory(fast, steps=STEPS):
        call(0)
        call(1)
        if changed:
            next(model.parameters()).mul_(1.5)
        elsewhere = threading.Thread(target=call, args=(0,))
        elsewhere.start()
        elsewhere.join()
        call(2)
    stats = accel.stats(fast)
    assert (stats.weight_changes, stats.predicted_steps) == (changed, not changed)
