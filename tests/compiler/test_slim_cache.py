"""SlimCache: in transformers' `generate`, against full caches and the reference."""

from __future__ import annotations

from typing import Any

import accel
import pytest
import torch
from accel.compiler.slim_cache import LAYER, SlimCache
from accel.kernels.omnisparse import reference
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

PROMPT = 300
EVERYTHING: dict[str, Any] = {"recall": 1.0, "window": 16}


def llama() -> LlamaForCausalLM:
    """Two layers, four query heads on two key heads; random, with scores large enough to matter."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"pad_token_id": 0, "eos_token_id": None, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens)).eval()


def prompt(batch: int = 2) -> dict[str, Tensor]:
    """Of several samples the first is padded on the left."""
    tokens = torch.randint(1, 64, (batch, PROMPT), generator=torch.Generator().manual_seed(1))
    there = torch.ones_like(tokens)
    if batch > 1:
        tokens[0, :50] = there[0, :50] = 0
    return {"input_ids": tokens, "attention_mask": there}


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": False},
        {"do_sample": True, "num_return_sequences": 3},
    ],
)
@torch.no_grad()
def test_everything_kept_generates_the_same(settings: dict[str, Any]) -> None:
    model, inputs = llama(), prompt()
    torch.manual_seed(2)
    wanted = model.generate(**inputs, max_new_tokens=12, **settings)
    cache = accel.SlimCache(model, **EVERYTHING)
    torch.manual_seed(2)
    got = model.generate(**inputs, max_new_tokens=12, past_key_values=cache, **settings)
    assert got.equal(wanted)
    assert cache.kept() == [[1.0, 1.0]] * 2


@torch.no_grad()
def test_guesses_that_are_taken_back() -> None:
    """transformers' prompt lookup crops the cache after wrong guesses."""
    model, inputs = llama(), prompt(1)
    wanted = model.generate(**inputs, max_new_tokens=30, do_sample=False)
    cache = accel.SlimCache(model, **EVERYTHING)
    settings = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 30, "do_sample": False}
    assert model.generate(**inputs, **settings, past_key_values=cache).equal(wanted)
    assert cache.get_seq_length() == PROMPT + 29


@torch.no_grad()
def test_less_memory_for_what_is_not_looked_at() -> None:
    """A head that the span does not matter to drops it; the others keep equally many entries."""
    model, inputs = llama(), prompt(1)
    cache = accel.SlimCache(model, span=(20, 260), recall=0.7, window=16)
    model.generate(**inputs, max_new_tokens=5, do_sample=False, past_key_values=cache)
    assert cache.get_seq_length() == PROMPT + 4
    assert cache.nbytes < 0.9 * cache.full_nbytes
    assert cache.full_nbytes == 2 * 2 * 2 * (PROMPT + 4) * 8 * 4
    for layer in cache.slim:
        assert len({group.positions.shape[2] for group in layer.groups}) == len(layer.groups)
        for group in layer.groups:
            assert (group.positions.diff() > 0).all()
            for place in (*range(20), *range(260, PROMPT + 4)):
                assert (group.positions == place).any(-1).all()
    alone = accel.SlimCache(model, span=(20, 260), recall=0.05, window=16)
    model(**inputs, past_key_values=alone)
    assert alone.kept() == [[60 / PROMPT] * 2] * 2


@pytest.mark.parametrize("tokens", [1, 3, 40])
@torch.no_grad()
def test_prompts_shorter_than_the_window(tokens: int) -> None:
    model = llama()
    some = prompt(1)["input_ids"][:, :tokens]
    wanted = model.generate(some, max_new_tokens=5, do_sample=False)
    cache = accel.SlimCache(model, recall=0.5)
    got = model.generate(some, max_new_tokens=5, do_sample=False, past_key_values=cache)
    assert got.equal(wanted)
    assert cache.kept() == [[1.0, 1.0]] * 2


@torch.no_grad()
def test_the_first_tokens_of_every_sample_stay() -> None:
    """Of the padded one, too, where they are not the first positions."""
    model, inputs = llama(), prompt()
    cache = accel.SlimCache(model, recall=0.05, window=16)
    model(**inputs, past_key_values=cache)
    for layer in cache.slim:
        for group in layer.groups:
            for sample, first in enumerate((50, 0)):
                for place in range(first, first + 4):
                    assert (group.positions[sample] == place).any(-1).all()


@pytest.mark.parametrize("queries", [1, 3])
@torch.no_grad()
def test_decoding_against_the_reference(queries: int) -> None:
    """One layer of one step, on the entries that are kept, with padding and several tokens."""
    model = llama()
    cache = SlimCache(model, recall=0.6, window=16)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randn(2, heads, PROMPT, 8, generator=generator) * 2 for heads in (4, 2, 2)]
    valid = torch.ones(2, PROMPT + queries, dtype=torch.bool)
    valid[0, :30] = False
    causal = torch.ones(PROMPT + queries, PROMPT + queries, dtype=torch.bool).tril()
    mask = causal[None, None] & valid[:, None, None]
    layer, module = cache.slim[0], model.model.layers[0].self_attn
    cache.update(*prompts[1:], 0)
    layer.attend(module, *prompts, mask[:, :, :PROMPT, :PROMPT])
    new = [torch.randn(2, heads, queries, 8, generator=generator) * 2 for heads in (4, 2, 2)]
    key, value = cache.update(*new[1:], 0)
    assert getattr(key, LAYER) is layer
    got, _ = layer.attend(module, new[0], key, value, mask[:, :, PROMPT:])
    allowed = torch.zeros(2, 2, 1, PROMPT + queries, dtype=torch.bool)
    for group in layer.groups:
        kept = torch.zeros(2, len(group.heads), PROMPT + queries, dtype=torch.bool)
        kept.scatter_(2, group.positions.long(), True)
        allowed[:, group.heads, 0] = kept
    assert not allowed.all()
    allowed = (allowed & mask[:, :, PROMPT:]).repeat_interleave(2, 1)
    whole = (
        torch.cat([old, now], 2).double() for old, now in zip(prompts[1:], new[1:], strict=True)
    )
    wanted, _ = reference.attend(new[0].double(), *whole, allowed, 8**-0.5)
    torch.testing.assert_close(got.transpose(1, 2).double(), wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_cache_can_be_cropped_to_what_is_whole() -> None:
    model, inputs = llama(), prompt(1)
    cache = accel.SlimCache(model, recall=0.5, window=16)
    first = model(**inputs, past_key_values=cache).logits[:, -1:]
    held = cache.nbytes
    token = first.argmax(-1)
    once = model(token, past_key_values=cache).logits
    cache.crop(-1)
    assert (cache.get_seq_length(), cache.nbytes) == (PROMPT, held)
    torch.testing.assert_close(model(token, past_key_values=cache).logits, once)
    with pytest.raises(accel.OptionError, match="a number from -17 to 0"):
        cache.crop(-18)
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    torch.testing.assert_close(model(**inputs, past_key_values=cache).logits[:, -1:], first)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recall": 0.0}, "recall is 0.0"),
        ({"heads": 2.0}, "heads is 2.0"),
        ({"window": 0}, "window is 0"),
        ({"span": (9, 2)}, r"span is \(9, 2\)"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(accel.OptionError, match=message):
        accel.SlimCache(llama(), **settings)


def test_sliding_windows_are_refused() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64, "num_hidden_layers": 1}
    model = MistralForCausalLM(MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    with pytest.raises(accel.OptionError, match="layers of sliding_attention"):
        accel.SlimCache(model)


@torch.no_grad()
def test_another_attention_function_is_noticed() -> None:
    model, inputs = llama(), prompt(1)
    cache = accel.SlimCache(model)
    model.set_attn_implementation("sdpa")
    with pytest.raises(accel.OptionError, match="did not reach accel's attention function"):
        model(**inputs, past_key_values=cache)


@torch.no_grad()
def test_other_caches_are_read_as_before() -> None:
    model, inputs = llama(), prompt()
    wanted = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    accel.SlimCache(model)
    assert model.generate(**inputs, max_new_tokens=5, do_sample=False).equal(wanted)
