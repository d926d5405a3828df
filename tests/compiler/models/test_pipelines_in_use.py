"""What people do with pipelines between and during runs: adapters, callbacks, offloading, guiders.

Of each: with every step computed the result is the plain pipeline's, and by default the plan holds
and a run is what it is in a pipeline of its own.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import accel
import pytest
import torch
from torch import Tensor

from ...models import relative
from ...pipelines_zoo.parts import Request
from ...pipelines_zoo.qwen import qwen
from ..test_pipelines import STEPS, flux, flux_pipeline
from .test_pipelines import EAGER, counts

FULL: dict[str, Any] = {**EAGER, "pade": {"schedule": "full"}}
TRUSTING: dict[str, Any] = {**EAGER, "pade": {"max_error": 1e9}}
COMPUTED = 8  # of 20 steps
Change = Callable[[Any], object]


# Adapters

LAYERS = ["to_q", "to_k", "ff.net.2"]


def with_adapters(pipeline: Any) -> Any:
    from peft import LoraConfig

    for seed, name in enumerate(("ink", "oil")):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=LAYERS, init_lora_weights=False)
        pipeline.transformer.add_adapter(config, adapter_name=name)
    pipeline.transformer.set_adapters(["ink"])
    return pipeline


CHANGES: dict[str, Change] = {
    "switched": lambda pipe: pipe.transformer.set_adapters(["oil"]),
    "off": lambda pipe: pipe.transformer.disable_adapters(),
    "fused": lambda pipe: (pipe.transformer.enable_adapters(), pipe.transformer.fuse_lora()),
    "unfused": lambda pipe: pipe.transformer.unfuse_lora(),
    "deleted": lambda pipe: pipe.transformer.delete_adapters(["ink", "oil"]),
}


def test_adapters_between_runs() -> None:
    expected = [run for run, _ in through_changes(with_adapters(flux_pipeline()))]
    differences = [relative(one, other) > 1e-3 for one, other in itertools.pairwise(expected)]
    assert differences == [name != "unfused" for name in CHANGES]
    always = accel.accelerate(with_adapters(flux_pipeline()), **FULL)
    for (got, _), plain in zip(through_changes(always), expected, strict=True):
        torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-4)
    fast = accel.accelerate(with_adapters(flux_pipeline()), **TRUSTING)
    for number, ((got, counted), plain) in enumerate(
        zip(through_changes(fast), expected, strict=True), 1
    ):
        assert relative(got, plain) < 0.2
        assert counted == (number * COMPUTED, number * (STEPS - COMPUTED))


def through_changes(pipeline: Any) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """A run before all changes and after each; and the calls that were computed, predicted."""
    torch.compiler.reset()  # Dynamo compiles some functions eight times and no more
    for change in (None, *CHANGES.values()):
        if change is not None:
            change(pipeline)
        result = flux(pipeline)
        compiled = pipeline.transformer._compiled_call_impl is not None
        yield result, counts(pipeline) if compiled else (0, 0)


@pytest.mark.parametrize("name", ["switched", "deleted"])
def test_adapters_during_a_run(name: str) -> None:
    """The step after the change is computed, whatever was planned."""
    computed: list[int] = []

    def change(pipe: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        if pipe is not plain:
            computed.append(counts(pipe)[0])
        if step == 9:
            CHANGES[name](pipe)
        return given

    plain, always, fast = (with_adapters(flux_pipeline()) for _ in range(3))
    accel.accelerate(always, **FULL)
    accel.accelerate(fast, **TRUSTING)
    expected = flux(plain, callback_on_step_end=change)
    got = flux(always, callback_on_step_end=change)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert relative(flux(fast, callback_on_step_end=change), expected) < 0.2
    # The last run is the one with predicted steps.
    assert computed[-STEPS + 10] == computed[-STEPS + 9] + 1


def test_pictures_as_prompts() -> None:
    """An IP-adapter; its picture may be another in the next run."""
    torch.manual_seed(0)
    weights = {
        "image_proj": {
            "proj.weight": torch.randn(4 * 32, 12), "proj.bias": torch.randn(4 * 32),
            "norm.weight": torch.ones(32), "norm.bias": torch.zeros(32),
        },
        "ip_adapter": {
            f"{block}.to_{kind}_ip.{part}": torch.randn(*shape) * 0.2
            for block in range(2) for kind in "kv"
            for part, shape in (("weight", (32, 32)), ("bias", (32,)))
        },
    }  # fmt: skip
    pictures = [torch.randn(1, 1, 12) for _ in range(3)]

    def built() -> Any:
        pipeline = flux_pipeline()
        pipeline.transformer._load_ip_adapter_weights([weights], low_cpu_mem_usage=False)
        return pipeline

    def run(pipeline: Any, picture: int) -> Tensor:
        more = {
            "ip_adapter_image_embeds": [pictures[picture]],
            "negative_ip_adapter_image_embeds": [torch.zeros(1, 1, 12)],
        }
        return flux(pipeline, guided=True, **more)

    plain, always, fast = (built() for _ in range(3))
    accel.accelerate(always, **FULL)
    accel.accelerate(fast, **TRUSTING)
    results = []
    for number, picture in enumerate((0, 1, 2, 0), 1):
        expected = run(plain, picture)
        torch.testing.assert_close(run(always, picture), expected, rtol=1e-4, atol=1e-4)
        results.append(run(fast, picture))
        assert relative(results[-1], expected) < 0.2
        assert counts(fast) == (2 * COMPUTED * number, 2 * (STEPS - COMPUTED) * number)
    assert relative(results[0], results[1]) > 1e-3
    torch.testing.assert_close(results[0], results[3], rtol=1e-4, atol=1e-4)


# Callbacks


def written(given: dict[str, Any]) -> dict[str, Any]:
    given["latents"].mul_(0.7)
    return given


def replaced(given: dict[str, Any]) -> dict[str, Any]:
    return {"latents": given["latents"] * 0.7}


def replaced_in_place(given: dict[str, Any]) -> dict[str, Any]:
    given["latents"] = given["latents"] * 0.7
    return given


@pytest.mark.parametrize(
    ("edit", "kind"),
    [
        (written, "function"), (replaced, "function"), (replaced_in_place, "function"),
        (written, "object"), (replaced, "several"),
    ],
)  # fmt: skip
def test_callbacks_that_edit(edit: Callable[[dict[str, Any]], dict[str, Any]], kind: str) -> None:
    """What they do is done, and the next step is computed: none has led to it."""
    from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

    computed: list[int] = []

    def callback(pipe: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        if pipe is not plain:
            computed.append(counts(pipe)[0])
        return edit(given) if step == 9 else given

    class Callback(PipelineCallback):
        tensor_inputs: ClassVar[list[str]] = ["latents"]

        def callback_fn(self, *given: Any) -> dict[str, Any]:
            return callback(*given)

    made = {
        "function": lambda: callback,
        "object": Callback,
        "several": lambda: MultiPipelineCallbacks([Callback()]),
    }[kind]
    plain = flux_pipeline()
    always = accel.accelerate(flux_pipeline(), **FULL)
    fast = accel.accelerate(flux_pipeline(), **TRUSTING)
    expected = flux(plain, callback_on_step_end=made())
    got = flux(always, callback_on_step_end=made())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert relative(flux(fast, callback_on_step_end=made()), expected) < 0.2
    # Of 20 steps the plan leaves out the one after the tenth.
    # The last run is the one with predicted steps.
    assert computed[-STEPS + 10] == computed[-STEPS + 9] + 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_callbacks_that_only_look_change_nothing(mode: Any) -> None:
    """And one that writes does, also where torch counts no writes."""
    edited = False

    def look(pipe: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        assert given["latents"].isfinite().all()
        return written(given) if edited and step == 9 else {}

    with mode():
        fast = accel.accelerate(flux_pipeline(), **TRUSTING)
        flux(fast, callback_on_step_end=look)
        assert counts(fast) == (COMPUTED, STEPS - COMPUTED)
        edited = True
        flux(fast, callback_on_step_end=look)
    assert counts(fast)[0] > 2 * COMPUTED


def test_callbacks_by_place() -> None:
    """Not by name, as few write it."""
    given: list[str] = []
    pipeline = flux_pipeline()
    names = list(inspect.signature(type(pipeline).__call__).parameters)
    place = names.index("callback_on_step_end") - 1

    def record(pipe: Any, step: int, time: Any, more: dict[str, Any]) -> dict[str, Any]:
        given.append("called")
        return replaced(more)

    accel.accelerate(pipeline, **TRUSTING)
    defaults = [each.default for each in inspect.signature(pipeline.__call__).parameters.values()]
    arguments = defaults[:place]
    known = {"height": 16, "width": 16, "num_inference_steps": 6, "output_type": "latent"}
    embeddings = {
        "prompt_embeds": torch.randn(1, 6, 32),
        "pooled_prompt_embeds": torch.randn(1, 16),
    }
    for name, value in {**known, **embeddings}.items():
        arguments[names.index(name) - 1] = value
    pipeline(*arguments, record)
    assert (len(given), counts(pipeline)[1]) == (6, 0)


# Offloading, as far as a CPU shows it


@pytest.mark.parametrize("first", [True, False])
def test_offloading_a_model(first: bool) -> None:
    """Before accelerate and after it."""

    def built(**options: Any) -> Any:
        from accelerate import cpu_offload_with_hook

        pipeline = flux_pipeline()
        if not first:
            accel.accelerate(pipeline, **options)
        # What `enable_model_cpu_offload` does where there is something to load to.
        cpu_offload_with_hook(pipeline.transformer, torch.device("cpu"))
        return accel.accelerate(pipeline, **options) if first else pipeline

    expected = flux(flux_pipeline())
    torch.testing.assert_close(flux(built(**FULL)), expected, rtol=1e-4, atol=1e-4)
    fast = built(**TRUSTING)
    for run in (1, 2):
        assert relative(flux(fast), expected) < 0.2
        assert counts(fast) == (run * COMPUTED, run * (STEPS - COMPUTED))


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_offloading_in_groups(kind: str) -> None:
    """Diffusers keeps Dynamo out of its hooks at each block: nothing is skipped, and it is said."""
    pipeline = accel.accelerate(flux_pipeline(), **TRUSTING)
    groups = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    pipeline.transformer.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type=kind,
        **groups,
    )  # fmt: skip
    expected = flux(flux_pipeline(), steps=6)
    torch.testing.assert_close(flux(pipeline, steps=6), expected, rtol=1e-4, atol=1e-4)
    assert counts(pipeline) == (0, 0)
    report = accel.report_of(pipeline.transformer)
    assert not report.fullgraph
    assert "captured in parts" in str(report)


# Modular pipelines and their guiders


def modular(guider: Any) -> Any:
    from diffusers.modular_pipelines import QwenImageAutoBlocks

    blocks = QwenImageAutoBlocks()
    blocks.sub_blocks.pop("text_encoder")
    pipeline = blocks.init_pipeline()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline.update_components(**qwen(), guider=guider)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pictures(pipeline: Any, steps: int = 12, **request: int) -> Tensor:
    r = Request(64, **request)
    latents: Tensor = pipeline(
        prompt_embeds=r.text(), prompt_embeds_mask=r.mask(),
        negative_prompt_embeds=r.text(negative=True), negative_prompt_embeds_mask=r.mask(),
        height=r.height, width=r.width, num_inference_steps=steps, output_type="pt",
        generator=torch.Generator().manual_seed(r.seed), output="latents",
    )  # fmt: skip
    return latents


@pytest.mark.parametrize(
    ("kind", "settings", "calls", "computed"),
    [
        ("ClassifierFreeGuidance", {}, 24, 10),
        # The branch without the prompt has fewer steps, and a beginning of its own.
        ("AdaptiveProjectedGuidance", {"start": 0.2, "stop": 0.7}, 18, 8),
    ],
)
def test_modular_pipelines(kind: str, settings: dict[str, Any], calls: int, computed: int) -> None:
    import diffusers.guiders

    def guider() -> Any:
        return getattr(diffusers.guiders, kind)(guidance_scale=4.0, **settings)

    expected = pictures(modular(guider()))
    always = accel.accelerate(modular(guider()), **FULL)
    torch.testing.assert_close(pictures(always), expected, rtol=1e-4, atol=1e-4)
    fast = accel.accelerate(modular(guider()), **TRUSTING)
    assert relative(pictures(fast), expected) < 0.3
    assert counts(fast) == (computed, calls - computed)
    other = {"seed": 1, "prompt": 1, "size": 1, "batch": 2, "steps": 10}
    alone = pictures(accel.accelerate(modular(guider()), **TRUSTING), **other)
    torch.testing.assert_close(pictures(fast, **other), alone, rtol=1e-4, atol=1e-4)
    assert accel.stats(fast.transformer).host_reads == 0
    accel.release(fast)
    torch.testing.assert_close(pictures(fast), expected, rtol=1e-4, atol=1e-4)


# Many runs


class CancelledError(Exception):
    pass


def test_many_runs_leave_nothing() -> None:
    """Runs of three lengths, a third of them cancelled."""
    fast = accel.accelerate(flux_pipeline(), **EAGER)
    last = 0

    def cancel(pipe: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == last:
            raise CancelledError
        return given

    def some(runs: int) -> int:
        nonlocal last
        for number in range(runs):
            last = 2 if number % 3 == 0 else 99
            steps = 4 + number % 3
            try:
                flux(fast, prompt=number % 5, steps=steps, callback_on_step_end=cancel)
            except CancelledError:
                assert number % 3 == 0
        gc.collect()
        return sum(type(each) is Tensor for each in gc.get_objects())

    some(6)
    before = some(6)
    assert some(60) == before
    assert accel.stats(fast.transformer).state_bytes == 0


def test_tasks_that_take_turns() -> None:
    """Pipelines that share one model, each in a task: every picture is what it is alone."""
    model = flux_pipeline()
    pipelines = [model, *(type(model)(**copied(model)) for _ in range(2))]
    for each in pipelines:
        each.set_progress_bar_config(disable=True)
        accel.accelerate(each, **EAGER)

    async def painted(pipeline: Any, prompt: int) -> Tensor:
        return await asyncio.to_thread(flux, pipeline, prompt=prompt, guided=prompt == 1)

    async def together() -> list[Tensor]:
        return await asyncio.gather(*(painted(each, n) for n, each in enumerate(pipelines)))

    alone = [
        flux(accel.accelerate(flux_pipeline(), **EAGER), prompt=n, guided=n == 1) for n in range(3)
    ]
    for _ in range(2):
        for got, expected in zip(asyncio.run(together()), alone, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def copied(pipeline: Any) -> dict[str, Any]:
    """Components, with a scheduler of one's own, as diffusers asks of who shares a model."""
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    return {**pipeline.components, "scheduler": scheduler}
