"""Whole pipelines of diffusers, used as their documentation says, with accel in the transformer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import accel
import pytest
import torch
from accel.tests.models import relative
from torch import Tensor

STEPS = 20


def vae() -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=16
    ).eval()


def class_pipeline() -> Any:
    """DiT with learned variance, DDIM and fused guidance."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        sample_size=8,
        num_embeds_ada_norm=1000,
    ).eval()
    # As in the published DiT checkpoints: without clipping.
    pipeline = DiTPipeline(
        transformer=transformer, vae=vae(), scheduler=DDIMScheduler(clip_sample=False)
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def flux_pipeline() -> Any:
    """Flux with two streams, whose text encoders are left out: prompts come as embeddings."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=False,
    ).eval()
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def flux(
    pipeline: Any, *, size: int = 16, guided: bool = False, prompt: int = 0, steps: int = STEPS,
    **more: Any,
) -> Tensor:  # fmt: skip
    generator = torch.Generator().manual_seed(7 + prompt)
    embeddings = [torch.randn(1, *shape, generator=generator) for shape in ((6, 32), (16,)) * 2]
    negative: dict[str, Any] = {}
    if guided:
        negative = {
            "negative_prompt_embeds": embeddings[2],
            "negative_pooled_prompt_embeds": embeddings[3],
            "true_cfg_scale": 2.0,
        }
    return pipeline(
        prompt_embeds=embeddings[0],
        pooled_prompt_embeds=embeddings[1],
        **negative,
        height=size,
        width=size,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **more,
    ).images


def accelerate(pipeline: Any, **pade: Any) -> Any:
    options = {"lowering": "eager", "verify": True, "pade": pade}
    pipeline.transformer.compile(backend="accel", fullgraph=True, options=options)
    return pipeline


def test_dit_pipeline() -> None:
    def pictures(pipeline: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        result = pipeline(
            [3, 5],
            # An untrained model and much guidance would leave nothing of the noise in one step.
            guidance_scale=1.5,
            num_inference_steps=STEPS,
            generator=generator,
            output_type="pt",
        )
        return torch.as_tensor(result.images)

    expected = pictures(class_pipeline())
    always = accelerate(class_pipeline(), schedule="full")
    torch.testing.assert_close(pictures(always), expected, rtol=1e-3, atol=1e-4)
    fast = accelerate(class_pipeline())
    for _ in range(2):
        assert relative(pictures(fast), expected) < 0.05
    stats = accel.stats(fast.transformer)
    # DDIM's times (950, 900, ..., 0) look like 19 steps to the first run, whose last step nobody
    # planned for; the second run knows its length.
    assert (stats.runs, stats.full_steps, stats.predicted_steps) == (2, 8 + 1 + 8, 23)


@pytest.mark.parametrize("guided", [False, True])
def test_flux_pipeline(guided: bool) -> None:
    """With true guidance the pipeline makes two calls a step, each in a `cache_context`."""
    expected = flux(flux_pipeline(), guided=guided)
    always = accelerate(flux_pipeline(), schedule="full")
    torch.testing.assert_close(flux(always, guided=guided), expected, rtol=1e-3, atol=1e-4)
    fast = accelerate(flux_pipeline())
    assert 0 < relative(flux(fast, guided=guided), expected) < 0.05
    stats = accel.stats(fast.transformer)
    branches = 1 + guided
    assert (stats.runs, stats.unmatched_calls) == (1, 0)
    assert (stats.full_steps, stats.predicted_steps) == (8 * branches, 12 * branches)


def test_other_resolutions_and_prompts_in_one_pipeline() -> None:
    """Each picture is what a pipeline of its own would have made."""
    fast = accelerate(flux_pipeline())
    for size, prompt in ((16, 0), (24, 0), (24, 1), (32, 1), (16, 0)):
        alone = flux(accelerate(flux_pipeline()), size=size, prompt=prompt)
        got = flux(fast, size=size, prompt=prompt)
        torch.testing.assert_close(got, alone, rtol=1e-3, atol=1e-4)
    stats = accel.stats(fast.transformer)
    assert (stats.runs, stats.full_steps, stats.predicted_steps) == (5, 5 * 8, 5 * 12)


def test_a_pipeline_is_calibrated_by_its_transformer(tmp_path: Path) -> None:
    """As README shows it: accelerated, calibrated, and accelerated again with the profile."""
    plain = flux_pipeline()
    fast = accel.accelerate(flux_pipeline(), lowering="eager")

    def run(seed: int) -> Tensor:
        return flux(fast, prompt=seed, steps=8)

    path = tmp_path / "profile.json"
    profile = accel.calibrate(fast.transformer, run, output=path)
    assert profile.steps == 8
    accel.accelerate(fast, lowering="eager", pade={"profile": path, "preset": "quality"})
    point = accel.PadeOptions(profile=path, preset="quality").point()
    assert point is not None
    before = accel.stats(fast.transformer).full_steps
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = flux(fast, prompt=1, steps=8)
    stats = accel.stats(fast.transformer)
    assert (stats.full_steps - before, stats.calibrated_steps) == (len(point.computed), 8)
    full = flux(plain, prompt=1, steps=8)
    error = (got - full).double().square().mean()
    decibels = 10 * torch.log10((full.max() - full.min()).double() ** 2 / error)
    assert float(decibels) == pytest.approx(point.psnr, abs=0.1)
