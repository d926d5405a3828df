"""The OmniSparse pass: what it replaces, what it leaves alone, and that it trains."""

from __future__ import annotations

from typing import Any

import accel
import pytest
import torch
from accel.kernels.omnisparse import op
from accel.kernels.omnisparse.selection import EXACT, select
from accel.tests.models import dit, euler, noise, relative
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

EAGER = {"lowering": "eager", "verify": True}


def labels() -> Tensor:
    return torch.tensor([1, 2])


@pytest.mark.parametrize("pade", [False, {"schedule": [0, 1, 2, 9], "max_error": 1e9}])
@torch.no_grad()
def test_everything_kept_is_the_plain_model(pade: Any) -> None:
    """Every attention of a DiT, inside shared subgraphs and in a branch."""
    model = dit(3)
    options = {**EAGER, "pade": pade, "omnisparse": {"recall": 1.0, "minimum": 16}}
    fast = torch.compile(model, backend="accel", fullgraph=True, options=options)
    start = noise()
    got = euler(fast, start, labels(), times=[1.0, 0.9, 0.8])
    for one, other in zip(got, euler(model, start, labels(), times=[1.0, 0.9, 0.8]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    passes = accel.report_of(fast).passes
    assert len(passes["omnisparse"].matched) == 3
    assert passes["outline"].matched
    assert bool(passes["pade"].matched) == bool(pade)


@torch.no_grad()
def test_inductor() -> None:
    """A small recall, so that the sparse way is taken."""
    model = dit(2)
    options = {"pade": False, "omnisparse": {"recall": 0.2, "window": 0, "minimum": 400}}
    fast = torch.compile(model, backend="accel", fullgraph=True, options=options)
    plain = torch.compile(model, backend="accel", options={**options, "lowering": "eager"})
    for batch in (2, 3):
        inputs = noise(batch, size=64)
        settings = {"timestep": torch.ones(batch), "class_labels": torch.arange(batch)}
        got, wanted = fast(inputs, **settings).sample, plain(inputs, **settings).sample
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        assert relative(got, model(inputs, **settings).sample) > 1e-3


def llama() -> nn.Module:
    """transformers' Llama: two layers, four query heads on two key heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, num_hidden_layers=2)).eval()


@torch.no_grad()
def test_a_language_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mask is computed from sizes, and its keys are repeated for the query heads."""
    heads = []

    def noting(query: Tensor, key: Tensor, *settings: Any) -> Any:
        heads.append(key.shape[1])
        return select(query, key, *settings)

    monkeypatch.setattr(op, "select", noting)
    model, tokens = llama(), torch.arange(600).reshape(2, 300) % 64
    options = {**EAGER, "omnisparse": {"recall": 1.0, "minimum": 200}}
    fast = torch.compile(model, backend="accel", fullgraph=True, dynamic=True, options=options)
    for length in (300, 250):
        for batch in (2, 1):
            some = tokens[:batch, :length]
            wanted = model(some, use_cache=False).logits
            got = fast(some, use_cache=False).logits
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert set(heads) == {2}
    passes = accel.report_of(fast).passes
    assert len(passes["omnisparse"].matched) == 2 * len(accel.report_of(fast).graphs)


@pytest.mark.parametrize("form", ["sdpa", "eager"])
@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_a_language_model_with_padding(form: str, dynamic: bool) -> None:
    """transformers' attention as one call and written out; the mask says what is padding."""
    model, tokens = llama(), torch.arange(600).reshape(2, 300) % 64
    model.set_attn_implementation(form)
    options = {**EAGER, "omnisparse": {"recall": 1.0, "minimum": 200}}
    fast = torch.compile(model, backend="accel", fullgraph=True, dynamic=dynamic, options=options)
    for length in (300, 250):
        some, there = tokens[:, :length], torch.ones(2, length, dtype=torch.long)
        there[0, :30] = 0
        wanted = model(some, attention_mask=there, use_cache=False).logits[there.bool()]
        got = fast(some, attention_mask=there, use_cache=False).logits[there.bool()]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    passes = accel.report_of(fast).passes["omnisparse"]
    assert len(passes.matched) == 2 * len(accel.report_of(fast).graphs)
    assert not passes.skipped


@torch.no_grad()
def test_weights_that_are_handed_out() -> None:
    model, tokens = llama(), torch.arange(300)[None] % 64
    model.set_attn_implementation("eager")
    options = {**EAGER, "omnisparse": {"minimum": 200}}
    found = accel.explain(
        model, tokens, use_cache=False, output_attentions=True, options=options
    ).passes["omnisparse"]
    assert not found.matched
    assert "is used elsewhere, too" in str(found.skipped[0])


class Aten(nn.Module):
    """The operator, as in graphs that torch.export has made."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.project(x).unflatten(-1, (2, 8)).transpose(1, 2)
        call = torch.ops.aten.scaled_dot_product_attention.default
        result: Tensor = call(heads, heads, heads, is_causal=True)
        return result


@torch.no_grad()
def test_aten_operators() -> None:
    options = {**EAGER, "omnisparse": {"recall": 1.0, "minimum": 0}}
    model, x = Aten(), torch.randn(2, 300, 16)
    fast = torch.compile(model, backend="accel", fullgraph=True, options=options)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert accel.report_of(fast).passes["omnisparse"].matched


class Attend(nn.Module):
    """One attention call, as asked."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings
        self.project = nn.Linear(16, 48)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        query, key, value = self.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        settings = self.settings if mask is None else {**self.settings, "attn_mask": mask}
        return scaled_dot_product_attention(query, key, value, **settings)


@pytest.mark.parametrize(
    ("settings", "mask", "length", "reason"),
    [
        ({}, None, 1000, "a short sequence"),
        ({"is_causal": True}, None, 1000, "1000 keys, fewer than minimum = 1024"),
        ({}, torch.ones(1100, 1100, dtype=torch.bool), 1100, "a mask"),
        ({"dropout_p": 0.1}, None, 1100, "dropout of 0.1"),
    ],
)
def test_what_is_left_alone(
    settings: dict[str, Any], mask: Tensor | None, length: int, reason: str
) -> None:
    found = accel.explain(
        Attend(**settings), torch.randn(1, length, 16), mask, options={"omnisparse": True}
    ).passes["omnisparse"]
    assert not found.matched
    assert reason in str(found.skipped[0])


class Repeated(Attend):
    """Keys are repeated for the query heads, and then, perhaps, changed."""

    def forward(self, x: Tensor, change: Any = 0.0) -> Tensor:
        query, key, value = self.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        query = torch.cat([query, -query], dim=1)
        key, value = (
            each[:, :, None].expand(-1, 2, 2, -1, 8).reshape(query.shape) for each in (key, value)
        )
        if change:
            key[:, 1].mul_(change)
        return scaled_dot_product_attention(query, key, value)


@pytest.mark.parametrize("change", [0.0, 5.0])
@torch.no_grad()
def test_repeated_heads_that_are_changed(change: float) -> None:
    torch.manual_seed(0)
    model, x = Repeated(), torch.randn(2, 300, 16)
    options = {**EAGER, "omnisparse": {"recall": 1.0, "minimum": 0}}
    fast = torch.compile(model, backend="accel", fullgraph=True, options=options)
    torch.testing.assert_close(fast(x, change), model(x, change), rtol=1e-4, atol=1e-5)
    assert accel.report_of(fast).passes["omnisparse"].matched


def test_models_without_attention_and_the_default() -> None:
    inputs = torch.randn(2, 16)
    found = accel.explain(nn.Linear(16, 16), inputs, options={"omnisparse": True})
    assert "no attention" in str(found.passes["omnisparse"].skipped[0])
    found = accel.explain(Attend(), torch.randn(1, 1100, 16))
    assert "turned off" in str(found.passes["omnisparse"].skipped[0])


@pytest.mark.parametrize(("lowering", "is_causal"), [("inductor", True), ("eager", False)])
def test_training(lowering: str, is_causal: bool) -> None:
    """Gradients are those of the same selection in plain torch."""
    torch.manual_seed(0)
    model, x = Attend(is_causal=is_causal), torch.randn(2, 1100, 16)
    sparse: dict[str, Any] = {"recall": 0.3, "window": 16}
    options = {"omnisparse": sparse, "lowering": lowering}
    fast = torch.compile(model, backend="accel", fullgraph=True, options=options)
    query, key, value = model.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    wanted = accel.omnisparse_attention(query, key, value, is_causal=is_causal, **sparse)
    dense = scaled_dot_product_attention(query, key, value, is_causal=is_causal)
    got = fast(x)
    torch.testing.assert_close(got, wanted)
    assert relative(got, dense) > 1e-3
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(got.square().sum(), parameters)
    expected = torch.autograd.grad(wanted.square().sum(), parameters)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-4)
    assert accel.report_of(fast).passes["omnisparse"].matched


@torch.no_grad()
def test_lengths_share_a_graph() -> None:
    model = Attend(is_causal=True)
    fast = torch.compile(
        model, backend="accel", fullgraph=True, dynamic=True,
        options={"omnisparse": {"recall": 1.0}, "lowering": "eager"},
    )  # fmt: skip
    for length in (1100, 1300, 2000):
        x = torch.randn(1, length, 16)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert accel.stats(fast).recompiles == 0


class Mixed(nn.Module):
    """Scores in float32 and values in bfloat16, as GPT-J's attention, or changed between."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.project = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        query = self.project(x).unflatten(-1, (2, 8)).transpose(1, 2)
        value = query.bfloat16() if self.kind == "types" else query.clone()
        scores = query @ query.transpose(-1, -2) / 3.0
        if self.kind == "alpha":
            scores = torch.add(scores, torch.zeros_like(scores), alpha=2)
        if self.kind == "bools":
            scores = scores + (torch.ones(300, 300).tril() > 0)
        weights = scores.softmax(-1)
        if self.kind == "in place":
            value.mul_(2)
        return weights.to(value.dtype) @ value


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("", ""),
        ("types", "of several types"),
        ("in place", "changes its inputs in place"),
        ("alpha", "none that is known"),
        ("bools", "a mask of bools that is added"),
    ],
)
@torch.no_grad()
def test_attention_written_out(kind: str, reason: str) -> None:
    model, x = Mixed(kind), torch.randn(2, 300, 16)
    options = {**EAGER, "omnisparse": {"recall": 1.0, "minimum": 0}}
    fast = torch.compile(model, backend="accel", fullgraph=True, options=options)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    found = accel.report_of(fast).passes["omnisparse"]
    assert bool(found.matched) == (not reason)
    assert not reason or reason in str(found.skipped[0])


@pytest.mark.parametrize("recall", [0.5, 1.0])
@torch.no_grad()
def test_stats_say_what_was_selected(recall: float) -> None:
    model = llama()
    sparse = {"recall": recall, "active": 0.0}
    fast = torch.compile(model, backend="accel", options={**EAGER, "omnisparse": sparse})
    tokens = torch.arange(1300)[None] % 64
    with accel.observe_selections() as observed:
        fast(tokens, use_cache=False)
    found = accel.stats(fast).attention
    assert len(found) == len(observed) == 2
    for own, selection in zip(found, observed, strict=True):
        shares = (selection.budget == EXACT).float().mean()
        assert own.exact == pytest.approx(float(shares))
        assert (own.exact == 1) == (recall == 1)
        assert own.recall >= recall
    assert accel.stats(model).attention == found
