"""The measurements of sparse attention, on a tiny random model instead of SmolLM2."""

from __future__ import annotations

from collections.abc import Callable

import accel
import pytest
import torch
from accel.examples.smollm2 import subject
from accel.examples.smollm2.bench import quality, run, speed
from accel.examples.smollm2.bench.attention import Attend, Noted, attention, dense, sparse
from accel.examples.smollm2.bench.baselines import flex_blocks, top_blocks, vertical_slash
from accel.examples.smollm2.bench.decode import slimmed
from accel.kernels.omnisparse.selection import Choice
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

TOKENS = torch.randint(1, 64, (700,), generator=torch.Generator().manual_seed(0))


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.3)).eval()


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, heads, 700, 16, generator=generator) for heads in (4, 2, 2)]


@pytest.mark.parametrize("method", [top_blocks, vertical_slash, flex_blocks])
@torch.no_grad()
def test_other_selectors_with_all_keys_are_dense(method: Callable[[float], Attend]) -> None:
    tensors = inputs()
    wanted = dense(*tensors)
    torch.testing.assert_close(method(1.0)(*tensors, 0), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(method(0.3)(*tensors, 0), wanted, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_pairs_are_counted() -> None:
    query, key, value = inputs()
    noted = Noted()
    sparse(Choice(1.0), noted)(query, key, value, 0)
    key[:, :, 3] = 20 * query[:, :2].mean(2)  # everybody looks there
    sparse(Choice(0.2, active=0.0, window=0), noted)(query, key, value, 0)
    assert noted.pairs[0] == 1
    assert 0.3 < noted.pairs[1] < 0.9


@torch.no_grad()
def test_quality_of_the_same_is_perfect() -> None:
    model = llama()
    exact = quality.log_probabilities(model, TOKENS, dense)
    with torch.no_grad():
        plain = model(TOKENS[None]).logits[0].log_softmax(-1)
    torch.testing.assert_close(exact, plain, rtol=1e-4, atol=1e-4)
    same = quality.compare(exact, exact, TOKENS)
    assert (same.change, same.divergence, same.agreement) == (0, 0, 1)
    other = quality.compare(exact.roll(1, 0), exact, TOKENS)
    assert other.divergence > 0.1
    assert other.agreement < 0.9


def test_the_model_is_left_as_it_was() -> None:
    model = llama()
    before = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), attention(model, dense):
        raise ZeroDivisionError
    assert model.config._attn_implementation == before


@torch.no_grad()
def test_layers_lengths_and_caches() -> None:
    model = llama()
    layers = speed.by_layer(model, TOKENS, Choice(0.3, active=0.0), repeats=1)
    assert [row.layer for row in layers] == [0, 1]
    tensors = speed.inputs_of(model, TOKENS, 1, Choice(1.0))
    assert [each.shape[1] for each in tensors] == [4, 2, 2]
    rows = speed.over_lengths(tensors, [300, 600], Choice(1.0), repeats=1)
    assert [(row[0], row[3]) for row in rows] == [(300, 1), (600, 1)]
    ((fewer, same),) = slimmed(model, TOKENS, 600, [{"recall": 1.0}])
    assert fewer == pytest.approx(1, abs=0.15)  # positions are held, too
    assert same.agreement == 1


def test_tables() -> None:
    lengths = [
        {"length": length, "dense_seconds": length**2, "sparse_seconds": length**1.5}
        for length in (4096, 8192)
    ]
    text = run._text({"lengths": {"length": 8192, "rows": lengths}})
    assert "to the power of 2.00 dense, 1.50 sparse" in text
    assert "| length | dense_seconds | sparse_seconds |" in text


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "PACKAGE", "no_such_package")
    monkeypatch.setattr(subject.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(accel.AccelError, match="pip install gguf"):
        subject.load()
    with pytest.raises(accel.OptionError, match="no such part: nothing"):
        run.run(subject.HANDBOOK / "nowhere", parts=["nothing"])
