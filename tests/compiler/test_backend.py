"""`torch.compile(model, backend="accel")` on real diffusers models: every kind of sampling run.

Most tests use the "eager" lowering, which runs the very graph that Inductor would compile.
"""

from __future__ import annotations

import gc
import itertools
import threading
from typing import Any

import accel
import pytest
import torch
from accel import OptionError
from accel.kernels.predictors import PREDICTORS, moments
from accel.passes.pade.schedule import place
from accel.tests.models import dit, euler, noise, relative, without_blocks
from torch import nn

LABELS = torch.tensor([1, 2])
PLANNED = list(place(20, 8))


def compiled(model: nn.Module, lowering: str = "eager", **options: Any) -> Any:
    options.setdefault("verify", True)
    options["lowering"] = lowering
    return torch.compile(model, backend="accel", fullgraph=True, options=options)


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_a_run_with_no_help_from_the_user(lowering: str) -> None:
    """20 steps: 8 computed at the planned places, equal to the plain model there so far."""
    model = dit()
    fast = compiled(model, lowering)
    plain = euler(model, noise(), LABELS)
    for _ in range(2):
        outputs = euler(fast, noise(), LABELS)
        torch.testing.assert_close(outputs[0], plain[0], rtol=1e-4, atol=1e-5)
        assert 0 < relative(outputs[-1], plain[-1]) < 0.2
    stats = accel.stats(fast)
    assert (stats.full_steps, stats.predicted_steps) == (16, 24)
    assert (stats.runs, stats.unmatched_calls, stats.recompiles) == (2, 0, 0)
    assert stats.state_bytes == 0  # finished runs hold nothing


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_always_compute_equals_the_plain_model(lowering: str) -> None:
    model = dit()
    fast = compiled(model, lowering, pade={"schedule": "full"})
    for got, expected in zip(
        euler(fast, noise(), LABELS, steps=5), euler(model, noise(), LABELS, steps=5), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert accel.stats(fast).predicted_steps == 0


def test_skipped_steps_do_not_run_the_blocks() -> None:
    model = dit()
    fast = compiled(model, pade={"schedule": [0, 1, 2, 5]})
    state = noise()
    with torch.no_grad():
        for step in range(3):
            timestep = torch.full((2,), 1000.0 - 50 * step)
            state = state - 0.015 * fast(state, timestep=timestep, class_labels=LABELS).sample
        with without_blocks(model):
            timestep = torch.full((2,), 850.0)
            output = fast(state, timestep=timestep, class_labels=LABELS).sample
    assert torch.isfinite(output).all()
    assert accel.stats(fast).predicted_steps == 1


@pytest.mark.parametrize("predictor", sorted(PREDICTORS))
def test_every_predictor_in_the_graph(predictor: str) -> None:
    model = dit()
    fast = compiled(model, pade={"predictor": predictor, "schedule": PLANNED, "max_error": 1e9})
    outputs = euler(fast, noise(), LABELS)
    assert all(torch.isfinite(output).all() for output in outputs)
    assert accel.stats(fast).predicted_steps == 12


@pytest.mark.parametrize("name", ["pade", "linear", "taylor-3", "pade-channel"])
def test_the_graph_predicts_what_the_predictor_says(name: str) -> None:
    """The residual that leaves a skip step is the reference's, on the run's own history."""
    from accel.compiler.runtime import sampling as runtime

    model = dit()
    fast = compiled(model, pade={"schedule": [0, 1, 2, 9], "predictor": name})
    euler(fast, noise(), LABELS, times=[1.0, 0.9, 0.75])
    ((graph, record),) = runtime.graphs_of(frozenset(map(id, model.parameters())))
    newest = list(record.runs.records.values())[-1].record
    residuals = [each.clone() for each in newest.carried.streams[0].residuals]
    seen: list[torch.Tensor] = []
    inner = graph.function

    def spy(*inputs: Any) -> Any:
        results = inner(*inputs)
        seen.append(results[-1])
        return results

    graph.function = spy
    with torch.no_grad():
        timestep = torch.full((2,), 600.0)
        fast(run_sample(model), timestep=timestep, class_labels=LABELS, return_dict=False)
    predictor = graph.state.predictor
    passed = [600.0, 750.0, 900.0, 1000.0, 1000.0][: predictor.history + 1]
    times = torch.tensor(passed, dtype=torch.float64)[:, None].expand(-1, 2)
    measured = moments(residuals[0], residuals[1:], residuals[0], predictor.granularity)
    coefficients = predictor.coefficients(times, torch.tensor(0.5), measured.double())
    assert coefficients is not None
    expected = predictor.predict(residuals, coefficients.float(), [])
    torch.testing.assert_close(seen[0], expected)


def run_sample(model: nn.Module) -> torch.Tensor:
    """The sample that `euler` would be at after three steps at times 1.0, 0.9, 0.75."""
    state, times = noise(), [1.0, 0.9, 0.75, 0.6]
    with torch.no_grad():
        for now, after in itertools.pairwise(times):
            timestep = torch.full((2,), now * 1000)
            out = model(state, timestep=timestep, class_labels=LABELS, return_dict=False)[0]
            state = state + (after - now) * out * 0.3
    return state


# Trajectories


def guided(model: Any, fused: bool, steps: int = 20) -> torch.Tensor:
    """Classifier-free guidance, fused in one batch or as two calls a step."""
    state = noise()
    none = torch.full_like(LABELS, 10)
    with torch.no_grad():
        for step in range(steps):
            time = 1000 * (1 - step / steps)
            if fused:
                both = model(
                    torch.cat([state, state]),
                    timestep=torch.full((4,), time),
                    class_labels=torch.cat([LABELS, none]),
                ).sample
                yes, no = both.chunk(2)
            else:
                timestep = torch.full((2,), time)
                yes = model(state, timestep=timestep, class_labels=LABELS).sample
                no = model(state, timestep=timestep, class_labels=none).sample
            state = state - (no + 3 * (yes - no)) / steps * 0.3
    return state


def test_separate_guidance_branches_keep_separate_state() -> None:
    model = dit()
    fused, separate = compiled(model), compiled(dit())
    together = guided(fused, fused=True)
    apart = guided(separate, fused=False)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    assert accel.stats(fused).predicted_steps == 12
    stats = accel.stats(separate)
    assert (stats.full_steps, stats.predicted_steps, stats.runs) == (16, 24, 1)
    assert stats.siblings == 2 * 20


def test_a_model_whose_weights_are_buffers() -> None:
    """As frozen and quantised models have them; `stats` finds it all the same."""
    model = dit(2)
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, weight.detach())
    fast = compiled(model)
    euler(fast, noise(), LABELS)
    stats = accel.stats(fast)
    assert (stats.full_steps, stats.predicted_steps) == (8, 12)


def test_a_new_prompt_begins_a_new_run() -> None:
    model = dit()
    fast = compiled(model)
    euler(fast, noise(), LABELS)
    other = euler(fast, noise(seed=5), torch.tensor([7, 8]))
    alone = compiled(dit())
    torch.testing.assert_close(other[-1], euler(alone, noise(seed=5), torch.tensor([7, 8]))[-1])
    assert accel.stats(fast).runs == 2


def test_the_same_prompt_with_other_noise() -> None:
    fast, alone = compiled(dit()), compiled(dit())
    euler(fast, noise(), LABELS)
    again = euler(fast, noise(seed=5), LABELS)
    torch.testing.assert_close(again[-1], euler(alone, noise(seed=5), LABELS)[-1])


def test_a_run_that_was_cut_off_leaves_nothing_behind() -> None:
    fast, alone = compiled(dit()), compiled(dit())
    euler(fast, noise(), LABELS, times=[1 - i / 20 for i in range(6)])
    again = euler(fast, noise(seed=5), LABELS)
    torch.testing.assert_close(again[-1], euler(alone, noise(seed=5), LABELS)[-1])


def test_two_interleaved_runs_with_one_prompt() -> None:
    """Only the samples tell them apart."""
    model, fast = dit(), compiled(dit())
    alone = [euler(compiled(model), noise(seed=s), LABELS)[-1] for s in (1, 2)]
    states, outputs = [noise(seed=1), noise(seed=2)], [None, None]
    with torch.no_grad():
        for step in range(20):
            timestep = torch.full((2,), (1 - step / 20) * 1000)
            for index in (0, 1):
                out = fast(states[index], timestep=timestep, class_labels=LABELS).sample
                outputs[index] = out
                states[index] = states[index] - out * 0.3 / 20
    for got, expected in zip(outputs, alone, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    stats = accel.stats(fast)
    assert (stats.full_steps, stats.predicted_steps, stats.runs) == (16, 24, 2)


def test_one_prompt_at_two_stages() -> None:
    """A request that begins while another with the same prompt is half way through."""
    fast = compiled(dit())
    alone = [euler(compiled(dit()), noise(seed=seed), LABELS)[-1] for seed in (1, 2)]
    states, outputs = [noise(seed=1), noise(seed=2)], [torch.zeros(0)] * 2
    with torch.no_grad():
        for tick in range(30):
            for index, step in enumerate((tick, tick - 10)):
                if 0 <= step < 20:
                    timestep = torch.full((2,), (1 - step / 20) * 1000)
                    out = fast(states[index], timestep=timestep, class_labels=LABELS).sample
                    outputs[index] = out
                    states[index] = states[index] - out * 0.3 / 20
    for got, expected in zip(outputs, alone, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    stats = accel.stats(fast)
    assert (stats.full_steps, stats.predicted_steps, stats.runs) == (16, 24, 2)


def test_heun_evaluates_twice_at_one_time() -> None:
    fast = compiled(dit())
    plain = dit()

    @torch.no_grad()
    def heun(model: Any, steps: int = 20) -> torch.Tensor:
        state = noise()
        times = [1 - i / steps for i in range(steps)] + [0.0]

        def slope(at: torch.Tensor, time: float) -> torch.Tensor:
            timestep = torch.full((2,), time * 1000)
            return model(at, timestep=timestep, class_labels=LABELS).sample * 0.3

        for now, after in itertools.pairwise(times):
            first = slope(state, now)
            guess = state + (after - now) * first
            second = slope(guess, after) if after > 0 else first
            state = state + (after - now) * (first + second) / 2
        return state

    got, expected = heun(fast), heun(plain)
    stats = accel.stats(fast)
    assert stats.runs == 1
    assert stats.unmatched_calls == 0
    assert stats.full_steps + stats.predicted_steps == 39
    assert stats.predicted_steps >= 15
    assert relative(got, expected) < 0.1


def test_identical_calls_are_one_step() -> None:
    fast, sample = compiled(dit()), noise()
    with torch.no_grad():
        for step in range(6):
            timestep = torch.full((2,), 1000.0 - 50 * step)
            first = fast(sample, timestep=timestep, class_labels=LABELS).sample
            second = fast(sample, timestep=timestep, class_labels=LABELS).sample
            torch.testing.assert_close(first, second)
            sample = sample - 0.015 * first
    stats = accel.stats(fast)
    assert stats.predicted_steps > 0
    assert stats.repeated_steps == 6
    assert stats.full_steps + stats.predicted_steps == 12


def test_another_batch_size_and_back() -> None:
    """A recompilation with a free batch dimension; runs of both sizes are right."""
    model = dit()
    fast = compiled(model)
    for batch in (2, 3, 5, 2):
        labels = torch.arange(batch)
        alone = compiled(dit())
        got = euler(fast, noise(batch), labels)
        torch.testing.assert_close(got[-1], euler(alone, noise(batch), labels)[-1],
                                   rtol=1e-4, atol=1e-5)  # fmt: skip
    stats = accel.stats(fast)
    assert stats.recompiles == 1
    assert stats.predicted_steps == 4 * 12


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_another_resolution_and_back(lowering: str) -> None:
    """Height and width both become free, so the token count is a product of two symbols."""
    fast = compiled(dit(), lowering=lowering)
    for size in (8, 12, 16, 8):
        alone = euler(compiled(dit()), noise(size=size), LABELS)
        got = euler(fast, noise(size=size), LABELS)
        torch.testing.assert_close(got[-1], alone[-1], rtol=1e-4, atol=1e-5)
    stats = accel.stats(fast)
    assert stats.recompiles == 1
    assert (stats.full_steps, stats.predicted_steps) == (4 * 8, 4 * 12)


def test_unequal_samples_do_not_disturb_each_other() -> None:
    """A batch of two samples equals two batches of one."""
    fast = compiled(dit())
    both = euler(fast, noise(), LABELS)[-1]
    for index in (0, 1):
        one = euler(compiled(dit()), noise()[index : index + 1], LABELS[index : index + 1])[-1]
        torch.testing.assert_close(both[index : index + 1], one, rtol=1e-4, atol=1e-5)


def test_two_models_of_one_class() -> None:
    """Dynamo runs both by one compiled graph; their runs must not meet."""
    first, second = dit(seed=0), dit(seed=3)
    fast_first, fast_second = compiled(first), compiled(second)
    alone = euler(compiled(dit(seed=3)), noise(), LABELS)[-1]
    euler(fast_first, noise(), LABELS, times=[1 - i / 20 for i in range(6)])
    got = euler(fast_second, noise(), LABELS)
    torch.testing.assert_close(got[-1], alone)
    assert accel.stats(fast_second).predicted_steps == 12
    assert accel.stats(fast_first).full_steps + accel.stats(fast_first).predicted_steps == 6


def test_two_threads() -> None:
    models = [dit(seed=0), dit(seed=3)]
    expected = [euler(compiled(model), noise(seed=i), LABELS)[-1] for i, model in enumerate(models)]
    fast = [compiled(model) for model in models]
    for index, model in enumerate(fast):
        euler(model, noise(seed=index), LABELS)  # compile one after the other
    results: dict[int, torch.Tensor] = {}

    def work(index: int) -> None:
        for _ in range(3):
            results[index] = euler(fast[index], noise(seed=index), LABELS)[-1]

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in (0, 1):
        torch.testing.assert_close(results[index], expected[index], rtol=1e-4, atol=1e-4)


def test_explicit_trajectory() -> None:
    fast = compiled(dit())
    euler(fast, noise(), LABELS, times=[1 - i / 20 for i in range(6)])  # left open
    with accel.trajectory(fast, steps=20):
        inside = euler(fast, noise(), LABELS)
    torch.testing.assert_close(inside[-1], euler(compiled(dit()), noise(), LABELS)[-1])


def test_explicit_trajectory_checks_the_schedule() -> None:
    fast = compiled(dit(), pade={"schedule": [0, 1, 30]})
    euler(fast, noise(), LABELS, steps=4)
    with pytest.raises(OptionError, match="only 20 steps"), accel.trajectory(fast, steps=20):
        pass
    with pytest.raises(OptionError, match="at least one step"), accel.trajectory(fast, steps=0):
        pass


class Once(nn.Module):
    """A block that gives NaN at one time."""

    def __init__(self, block: nn.Module, time: float) -> None:
        super().__init__()
        self.block, self.time, self.norm1 = block, time, block.norm1

    def forward(self, x: torch.Tensor, *args: Any, timestep: torch.Tensor, **kw: Any) -> Any:
        out = self.block(x, *args, timestep=timestep, **kw)
        return torch.where((timestep == self.time)[:, None, None], torch.nan, out)


def test_nan_in_the_features_is_computed_and_counted() -> None:
    """A computed step with NaN stays out of the history; the next step is computed."""
    model = dit()
    for index, block in enumerate(model.transformer_blocks):
        model.transformer_blocks[index] = Once(block, 900.0)
    fast = compiled(model, pade={"schedule": [0, 1, 2, 9]})
    outputs = []
    with torch.no_grad(), accel.trajectory(fast):
        for step in range(5):
            sample = noise() * (1 - 0.02 * step)
            timestep = torch.full((2,), 1000.0 - 50 * step)
            outputs.append(fast(sample, timestep=timestep, class_labels=LABELS).sample)
    assert torch.isnan(outputs[2]).any()  # what the model itself gives
    for step in (3, 4):
        assert torch.isfinite(outputs[step]).all()
    stats = accel.stats(fast)
    assert stats.nonfinite_steps == 1
    assert stats.untrusted_steps == 1
    assert (stats.full_steps, stats.predicted_steps) == (4, 1)


def test_a_gate_can_refuse_every_skip() -> None:
    gate = {"score": "error", "skip_if": "<", "threshold": 0.0}
    fast = compiled(dit(), pade={"gate": gate})
    euler(fast, noise(), LABELS)
    stats = accel.stats(fast)
    assert stats.predicted_steps == 0
    assert stats.gated_steps == 12


def test_many_runs_hold_no_memory() -> None:
    """1,000 runs with ever new prompts and lengths, some cut off."""
    torch.set_num_threads(1)  # for such small work, threads only cost time
    one_run = 3 * 2 * 16 * 32 * 4
    fast = compiled(dit(blocks=2), pade={"max_runs": 4, "max_state_bytes": 4 * one_run})
    generator = torch.Generator().manual_seed(0)

    def runs(count: int) -> int:
        for index in range(count):
            labels = torch.randint(0, 10, (2,), generator=generator)
            euler(fast, noise(seed=index), labels, times=[1 - i / 4 for i in range(2 + index % 3)])
        gc.collect()
        # By type: `isinstance` asks each object, and torch's deprecated ones answer with a warning.
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    before = runs(100)
    assert runs(900) <= before + 40
    assert accel.stats(fast).runs >= 1000
    assert accel.stats(fast).state_bytes <= 4 * one_run


# Declining


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_training_passes_through(lowering: str) -> None:
    """Gradients equal the plain model's; equal blocks still share one compiled subgraph."""
    model = dit()
    fast = torch.compile(model, backend="accel", fullgraph=True, options={"lowering": lowering})
    timestep = torch.full((2,), 500.0)

    def gradients(call: Any) -> list[torch.Tensor]:
        model.zero_grad()
        call(noise(), timestep=timestep, class_labels=LABELS).sample.square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    got, expected = gradients(fast), gradients(model)
    assert len(got) == len(expected) > 0
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    report = accel.explain(model, noise(), timestep=timestep, class_labels=LABELS)
    assert not report.passes["pade"].matched
    assert report.passes["pade"].skipped[0].reason.value == "training graph"
    assert report.passes["outline"].matched == ("transformer_blocks (2 blocks)",)


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_models_without_blocks_still_run(lowering: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    fast = torch.compile(model, backend="accel", options={"lowering": lowering})
    with torch.no_grad():
        torch.testing.assert_close(fast(torch.ones(3, 4)), model(torch.ones(3, 4)))
    report = accel.explain(model, torch.ones(3, 4))
    assert not report.passes["pade"].matched
    assert accel.stats(fast).full_steps == 0
