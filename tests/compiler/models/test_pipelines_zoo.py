"""Pipelines of many families through `accel.accelerate`; `pipelines_zoo/survey.py` has all."""

from __future__ import annotations

import pytest
import torch

from ...pipelines_zoo import PIPELINES
from ...pipelines_zoo.survey import STEPS, checked

# One of each way in which pipelines say where they are: counted steps, whole and cut schedules,
# two models, calls by name, calls in one batch, controls that change, edited pictures, solvers
# with several calls a step, and a time for each sample.
SOME = (
    "DiTPipeline", "BriaPipeline", "FluxImg2ImgPipeline", "FluxKontextPipeline",
    "FluxControlNetPipeline", "StableDiffusion3Pipeline Heun", "WanPipeline 2.2",
    "CogVideoXPipeline DPM", "StableAudioPipeline", "SanaSprintImg2ImgPipeline",
)  # fmt: skip


@pytest.mark.parametrize("name", SOME)
def test_a_pipeline(name: str) -> None:
    torch.set_num_threads(1)
    row = checked(PIPELINES[name])
    assert not row.note
    assert row.holds
    calls = row.computed + row.predicted
    if name in ("DiTPipeline", "BriaPipeline"):
        assert (row.computed, row.predicted) == (5 * calls // STEPS, 7 * calls // STEPS)
    assert 0.35 < row.computed / calls < 0.65
