"""An engine in the place of a pipeline's transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accel
import torch
from accel.tests.compiler.test_pipelines import flux, flux_pipeline
from accel.tests.models import relative


def recorded(pipeline: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a pipeline hands to its transformer on the first step: example inputs for an export."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))

    hook = pipeline.transformer.register_forward_pre_hook(note, with_kwargs=True)
    flux(pipeline)
    hook.remove()
    return calls[0]


def test_flux_pipeline_on_an_engine(tmp_path: Path) -> None:
    """Guidance in two calls, with diffusers' cache_context around each; two prompts."""
    pipeline = flux_pipeline()
    args, kwargs = recorded(pipeline)
    pipeline.transformer.eval()
    network = pipeline.transformer
    pipeline.transformer = torch.compile(
        network, backend="accel", fullgraph=True, options={"lowering": "eager"}
    )
    expected = [flux(pipeline, guided=True, prompt=prompt) for prompt in (0, 1)]
    engine = accel.export(network, args, kwargs, path=tmp_path / "flux.onnx")
    pipeline.transformer = engine
    got = [flux(pipeline, guided=True, prompt=prompt) for prompt in (0, 1)]
    for one, other in zip(got, expected, strict=True):
        assert relative(one, other) < 1e-3
    stats = engine.stats()
    assert (stats.full_steps, stats.predicted_steps) == (4 * 8, 4 * 12)
    assert stats.runs == 2
    assert pipeline.transformer.config.in_channels == 16
    assert pipeline.transformer.dtype == torch.float32
