"""Visual tokens, found in the graphs of transformers' video-language models."""

from __future__ import annotations

from typing import Any

import accel
import pytest
import torch
from accel.kernels.omnisparse import cpu
from accel.tests.models import relative
from accel.tests.video_models import AFTER, BEFORE, MODELS
from torch import Tensor, nn

TAIL = 16


def compiled(model: nn.Module, **sparse: Any) -> Any:
    options = {"pade": False, "outline": False, "lowering": "eager", "verify": True}
    torch.compiler.reset()
    given = {**options, "omnisparse": {"minimum": 1000, "tail": TAIL, **sparse}}
    return torch.compile(model, backend="accel", options=given)


def with_positions(name: str, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Qwen2.5-VL's `forward` computes them in Python, between features and layers, so that these
    are in different graphs; its `generate` gives them, as here."""
    if name != "qwen2.5-vl":
        return inputs
    asked = ("input_ids", "mm_token_type_ids", "video_grid_thw", "attention_mask")
    positions, _ = model.model.get_rope_index(**{each: inputs[each] for each in asked})
    return {**inputs, "position_ids": positions}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_only_the_video_may_be_lazy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = MODELS[name]()
    inputs = with_positions(name, model, inputs)
    wanted = model(**inputs).logits
    found: list[Tensor] = []
    plain = cpu.forward

    def forward(*arguments: Any) -> Any:
        results = plain(*arguments)
        found.append(results[2])
        return results

    monkeypatch.setattr(cpu, "forward", forward)
    everything = compiled(model, recall=1.0)
    torch.testing.assert_close(everything(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)
    found.clear()
    fast = compiled(model, recall=0.5, active=0.0)
    assert 1e-3 < relative(fast(**inputs).logits, wanted) < 0.5
    assert len(found) == 2  # layers
    tokens = wanted.shape[1]
    for active in found:  # the first segments are exact: nobody is active there
        assert active[..., tokens - AFTER :].all()
        assert not active[..., BEFORE : tokens - AFTER - 1].any()
    # The graph of `everything` may still be there, before it.
    *_, detail = accel.report_of(fast).passes["omnisparse"].details
    assert detail["may be lazy"].startswith("those in ")


@torch.no_grad()
def test_where_the_graph_does_not_show_them() -> None:
    model, inputs = MODELS["qwen2.5-vl"]()
    fast = compiled(model)
    fast(**inputs)
    (detail,) = accel.report_of(fast).passes["omnisparse"].details
    assert detail["may be lazy"] == "all queries"


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_slim_cache_on_the_video(name: str) -> None:
    model, inputs = MODELS[name]()
    span = accel.visual_span(model, inputs["input_ids"])
    tokens = inputs["input_ids"].shape[1]
    assert BEFORE <= span[0] < BEFORE + 2
    assert tokens - AFTER <= span[1] + 1 <= tokens - AFTER + 1
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    wanted = model.generate(**inputs, **settings)
    for recall, fewer in ((1.0, False), (0.5, True)):
        cache = accel.SlimCache(model, span=span, recall=recall, window=16)
        got = model.generate(**inputs, **settings, past_key_values=cache)
        assert got.shape == wanted.shape
        assert fewer or got.equal(wanted)
        assert (cache.nbytes < 0.9 * cache.full_nbytes) == fewer


def test_models_that_name_no_placeholders() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1))
    with pytest.raises(accel.OptionError, match="LlamaForCausalLM has none of image_token_id"):
        accel.visual_span(model, torch.zeros(1, 4, dtype=torch.int64))


@torch.no_grad()
def test_prompts_without_video() -> None:
    model, _ = MODELS["llava-onevision"]()
    assert accel.visual_span(model, torch.full((2, 8), 7)) == (0, 0)
