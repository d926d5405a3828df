"""SlimCache: in transformers' `generate`, against full caches and the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accel
import pytest
import torch
from accel.compiler.models.slim_cache import SlimCache
from accel.kernels.omnisparse import reference
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from ... import transformers_zoo as zoo

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


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)


def eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, dim=1)
    scores = query @ key.transpose(-1, -2) * 8**-0.5
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1) @ value


@pytest.mark.parametrize("attend", [sdpa, eager])
@pytest.mark.parametrize("queries", [1, 3])
@torch.no_grad()
def test_decoding_against_the_reference(queries: int, attend: Callable[..., Tensor]) -> None:
    """One layer of one step, on the entries that are kept, with padding and several tokens."""
    model = llama()
    cache = SlimCache(model, recall=0.6, window=16)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randn(2, heads, PROMPT, 8, generator=generator) * 2 for heads in (4, 2, 2)]
    valid = torch.ones(2, PROMPT + queries, dtype=torch.bool)
    valid[0, :30] = False
    causal = torch.ones(PROMPT + queries, PROMPT + queries, dtype=torch.bool).tril()
    mask = causal[None, None] & valid[:, None, None]
    layer = cache.slim[0]
    key, value = cache.update(*prompts[1:], 0)
    attend(prompts[0], key, value, mask[:, :, :PROMPT, :PROMPT])
    new = [torch.randn(2, heads, queries, 8, generator=generator) * 2 for heads in (4, 2, 2)]
    key, value = cache.update(*new[1:], 0)
    assert key.shape == (2, 2, PROMPT + queries, 8)
    got = attend(new[0], key, value, mask[:, :, PROMPT:])
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
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)


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


# Of the zoo's decoders, some of each way to attend: what SlimCache makes of them.
SERVED = (
    "llama", "opt", "gpt2", "gpt_neo", "gptj", "gpt_bigcode", "gpt_neox", "falcon", "bert", "ctrl",
    "gpt_oss",
)  # fmt: skip
REFUSED = {
    "bloom": "keys of layer 0 went into reshape",
    "diffllama": "values of layer 0 went into chunk",
    "doge": "values of layer 0 went into transpose",
    "deepseek_v3": "keys of layer 0 went into linear",
}


def some(model: Any, **settings: Any) -> tuple[Tensor, Tensor]:
    """What is generated after a padded prompt: tokens, and the logits of each."""
    tokens = torch.randint(3, 60, (2, 80), generator=torch.Generator().manual_seed(1))
    there = torch.ones_like(tokens)
    there[0, :30] = 0
    model.generation_config.eos_token_id = None
    output = model.generate(
        tokens, attention_mask=there, max_new_tokens=5, do_sample=False, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True, **settings,
    )  # fmt: skip
    return output.sequences, torch.stack(output.logits)


@pytest.mark.parametrize("kind", SERVED)
@torch.no_grad()
def test_attention_of_many_kinds(kind: str) -> None:
    """Equal where nothing is dropped; and what is dropped is not looked at. Without the cache the
    model does what it did."""
    model = zoo.decoder(kind)
    before = model.config._attn_implementation
    tokens, logits = some(model)
    got, same = some(model, past_key_values=accel.SlimCache(model, **EVERYTHING))
    assert got.equal(tokens)
    torch.testing.assert_close(same, logits, rtol=1e-4, atol=1e-5)
    cache = accel.SlimCache(model, recall=0.6, window=16)
    some(model, past_key_values=cache)
    assert 0 < cache.nbytes < 0.9 * cache.full_nbytes
    assert some(model)[1].equal(logits)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("kind", REFUSED)
@torch.no_grad()
def test_other_uses_of_keys_and_values_are_refused(kind: str) -> None:
    model = zoo.decoder(kind)
    with pytest.raises(accel.OptionError, match=REFUSED[kind]):
        some(model, past_key_values=accel.SlimCache(model, **EVERYTHING))


def softcapped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    scores = (query @ key.repeat_interleave(2, 1).transpose(2, 3)).div(5).tanh() * 5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value.repeat_interleave(2, 1)


def written(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    value[:, :, 0] = 0
    return sdpa(query, key, value, mask)


def negative(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    return query @ key.transpose(2, 3) @ value


def twice(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return sdpa(query, key, value, mask) - sdpa(query.flip(1), key, value, mask)


def scaled(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return sdpa(query, key * 2, value, mask)


def tiled(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return sdpa(query, key.repeat(1, 2, 1, 1), value.repeat(1, 2, 1, 1), mask)


def shifted(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return sdpa(query, key[:, :, 1:], value[:, :, 1:], mask[..., 1:])


def swapped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return sdpa(query, value, key, mask)


def dropping(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(
        query, key, value, mask, dropout_p=0.1, enable_gqa=True
    )


@pytest.mark.parametrize(
    ("attend", "message"),
    [
        (written, "values of layer 0 went into __setitem__"),
        (scaled, "keys of layer 0 went into mul"),
        (tiled, "keys of layer 0 went into repeat;"),
        (shifted, "keys of layer 0 went into __getitem__"),
        (swapped, "went into scaled_dot_product_attention, not as the keys and values"),
        (twice, "keys of layer 0 were used a second time"),
        (negative, "weights of layer 0 are negative"),
        (dropping, "dropout_p is 0.1"),
    ],
)
@torch.no_grad()
def test_attention_that_is_another(attend: Callable[..., Tensor], message: str) -> None:
    cache = SlimCache(llama(), **EVERYTHING)
    query, key, value = (torch.randn(2, heads, PROMPT, 8) for heads in (4, 2, 2))
    mask = torch.ones(PROMPT, PROMPT, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    with pytest.raises(accel.OptionError, match=message):
        attend(query, *cache.update(key, value, 0), mask)


@torch.no_grad()
def test_weight_on_what_is_gone_is_noticed() -> None:
    """A cap on scores gives some to those that are -inf; where all is kept it is as any other."""
    for recall in (1.0, 0.5):
        cache = SlimCache(llama(), recall=recall, window=16)
        query, key, value = (torch.randn(2, heads, PROMPT, 8) * 3 for heads in (4, 2, 2))
        mask = torch.ones(PROMPT + 1, PROMPT + 1, dtype=torch.bool).tril().expand(2, 1, -1, -1)
        softcapped(query, *cache.update(key, value, 0), mask[..., :PROMPT, :PROMPT])
        query, new, more = (torch.randn(2, heads, 1, 8) for heads in (4, 2, 2))
        handed = cache.update(new, more, 0)
        if recall < 1:
            with pytest.raises(accel.OptionError, match="gives weight to entries whose score"):
                softcapped(query, *handed, mask[..., PROMPT:, :])
        else:
            whole = torch.cat([key, new], 2), torch.cat([value, more], 2)
            got = softcapped(query, *handed, mask[..., PROMPT:, :])
            torch.testing.assert_close(got, softcapped(query, *whole, mask[..., PROMPT:, :]))


@torch.no_grad()
def test_keys_that_never_reach_attention_are_noticed() -> None:
    cache = SlimCache(llama())
    keys = torch.randn(1, 2, 5, 8)
    cache.update(keys, keys, 0)
    with pytest.raises(accel.OptionError, match="keys and values of layer 0 did not reach"):
        cache.update(keys, keys, 1)


@torch.no_grad()
def test_more_layers_than_the_config_says() -> None:
    keys = torch.randn(1, 2, 5, 8)
    with pytest.raises(accel.OptionError, match="has a layer 2, and its config 2 layers"):
        SlimCache(llama()).update(keys, keys, 2)


@torch.no_grad()
def test_a_kernel_of_another_library_is_noticed() -> None:
    """One that torch's functions do not lead to."""

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, key: Tensor) -> Tensor:
            return torch.ops.aten.relu.default(key)

    keys = torch.randn(1, 2, 5, 8)
    handed, _ = SlimCache(llama()).update(keys, keys, 0)
    with pytest.raises(accel.OptionError, match=r"keys of layer 0 went into .*relu"):
        Kernel.apply(handed)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_autocast(implementation: str) -> None:
    model, inputs = llama(), prompt()
    model.set_attn_implementation(implementation)
    token = torch.full((2, 1), 5)
    there = torch.cat([inputs["attention_mask"], torch.ones_like(token)], 1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = []
        for cache in (None, SlimCache(model, **EVERYTHING)):
            first = model(**inputs, past_key_values=cache, use_cache=True)
            last = model(token, attention_mask=there, past_key_values=first.past_key_values)
            logits.append(last.logits)
        torch.testing.assert_close(*logits, rtol=0.05, atol=0.1)


@torch.no_grad()
def test_compiled_models_are_served() -> None:
    model, inputs = llama(), prompt(1)
    token = torch.tensor([[5]])
    plain = SlimCache(model, recall=0.5, window=16)
    wanted = [model(each, past_key_values=plain).logits for each in (inputs["input_ids"], token)]
    cache = SlimCache(model, recall=0.5, window=16)
    fast = torch.compile(model, backend="accel", options={"lowering": "eager"})
    got = [fast(each, past_key_values=cache).logits for each in (inputs["input_ids"], token)]
    torch.testing.assert_close(got, wanted)
    assert cache.nbytes == plain.nbytes < 0.9 * plain.full_nbytes
