"""Which run a call belongs to, from its inputs alone."""

from __future__ import annotations

import pytest
import torch
from accel.compiler.runtime.trajectory import Call, Relation, Runs, digest, distance, sketch
from torch import Tensor


def call(time: float, sample: Tensor, *conditions: object) -> Call:
    return Call((("shape",), *conditions), time, sample)


def noise(seed: int) -> Tensor:
    return torch.randn(64, generator=torch.Generator().manual_seed(seed))


def test_digest_sees_values_order_and_type() -> None:
    x = torch.arange(12.0)
    assert digest(x) == digest(x.clone())
    assert digest(x) != digest(x.flip(0))
    assert digest(x) != digest(x + 1e-6)
    assert digest(torch.tensor([1, 2])) != digest(torch.tensor([2, 1]))
    for dtype in (torch.bool, torch.bfloat16, torch.float16, torch.int8, torch.complex64):
        assert isinstance(digest(torch.ones(3, dtype=dtype)), int)
    assert digest(x[::2]) == digest(x[::2].contiguous())


def test_distance() -> None:
    assert distance(noise(0), noise(0)) == 0
    assert distance(noise(0), noise(0) * 0.9) == pytest.approx(0.1, abs=1e-4)
    assert distance(noise(0), noise(1)) > 1
    assert distance(noise(0), torch.full((64,), float("nan"))) == float("inf")
    assert distance(noise(0), torch.zeros(3)) == float("inf")
    assert sketch([torch.randn(3, 4000), torch.ones(2)]).numel() < 2000


def test_steps_repeats_and_a_new_run() -> None:
    runs = Runs(limit=4)
    x = noise(0)
    run, relation = runs.locate(call(1.0, x))
    assert relation is Relation.NEXT
    assert runs.locate(call(1.0, x)) == (run, Relation.REPEAT)
    assert runs.locate(call(0.9, x * 0.95)) == (run, Relation.NEXT)
    assert run.step == 1
    again, _ = runs.locate(call(1.0, noise(1)))
    assert again is not run
    assert runs.started == 2


def test_conditions_tell_runs_apart() -> None:
    runs = Runs(limit=4)
    x = noise(0)
    for step in range(5):
        for prompt in ("yes", "no"):
            runs.locate(call(1 - step / 10, x * (1 - step / 50), prompt))
    assert runs.started == 2
    assert [run.step for run in runs.live.values()] == [4, 4]
    assert not runs.varying


def test_a_condition_that_always_changes_is_learnt() -> None:
    """A ControlNet's output differs at every step; after a few steps it no longer divides runs."""
    runs = Runs(limit=4)
    x = noise(0)
    for step in range(10):
        runs.locate(call(1 - step / 20, x * (1 - step / 50), "prompt", f"control {step}"))
    assert runs.varying == {2}
    assert runs.started == 4


def test_guidance_that_begins_late_is_not_taken_for_a_varying_prompt() -> None:
    runs = Runs(limit=4)
    x = noise(0)
    for step in range(10):
        now = x * (1 - step / 50)
        if step >= 4:
            runs.locate(call(1 - step / 20, now, "no"))
        runs.locate(call(1 - step / 20, now, "yes"))
    assert not runs.varying
    assert runs.started == 2


def test_the_limit_frees_the_longest_unused() -> None:
    runs = Runs(limit=2)
    for prompt in ("a", "b", "c"):
        runs.locate(call(1.0, noise(0), prompt))
    assert [run.conditions[1] for run in runs.live.values()] == ["b", "c"]


def test_time_may_go_back_only_in_an_explicit_run() -> None:
    x = noise(0)
    for single, started in ((False, 2), (True, 1)):
        runs = Runs(limit=4, single=single)
        for time in (1.0, 0.8, 0.9):
            runs.locate(call(time, x))
            x = x * 0.99
        assert runs.started == started


def test_rising_time() -> None:
    runs = Runs(limit=4)
    x = noise(0)
    for step in range(5):
        run, _ = runs.locate(call(step / 20, x * (1 - step / 50)))
    assert runs.started == 1
    assert run.steps == 20
