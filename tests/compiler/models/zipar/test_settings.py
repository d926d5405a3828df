"""Settings of `generate`: each gives the tokens of `generate`, or is refused by name.

With a window of all columns, so that the two can be compared.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accel import ZipAR
from accel.compiler.models.zipar import settings as known
from accel.kernels.errors import AccelError, OptionError
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteriaList

from ....language_models import janus, llama

PROMPT = torch.tensor([[1, 5, 6, 7, 9], [1, 8, 8, 4, 3]])
USUAL: dict[str, Any] = {"do_sample": False, "pad_token_id": 39}
TOKENS = 6
# A value of each field of GenerationConfig that says something there.
VALUES: dict[str, Any] = {
    "max_length": 8, "max_new_tokens": 4, "min_length": 3, "min_new_tokens": 3,
    "early_stopping": True, "max_time": 100.0, "stop_strings": ["x"], "do_sample": False,
    "num_beams": 2, "use_mtp": True, "use_cache": False, "cache_implementation": "static",
    "cache_config": {"max_batch_size": 2}, "max_cache_len": 40, "temperature": 0.5, "top_k": 3,
    "top_p": 0.5, "min_p": 0.1, "top_h": 0.5, "typical_p": 0.5, "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1, "repetition_penalty": 2.0, "encoder_repetition_penalty": 2.0,
    "length_penalty": 2.0, "no_repeat_ngram_size": 1, "bad_words_ids": [[3], [7]],
    "renormalize_logits": True, "forced_bos_token_id": 3, "forced_eos_token_id": 3,
    "remove_invalid_values": True, "exponential_decay_length_penalty": (1, 2.0),
    "suppress_tokens": list(range(20)), "begin_suppress_tokens": list(range(20)),
    "sequence_bias": {(3,): 99.0}, "token_healing": True, "guidance_scale": 3.0,
    "num_return_sequences": 1, "output_attentions": True, "output_hidden_states": True,
    "output_scores": True, "output_logits": True, "return_dict_in_generate": True,
    "pad_token_id": 38, "bos_token_id": 2, "eos_token_id": 8, "encoder_no_repeat_ngram_size": 1,
    "decoder_start_token_id": 4, "is_assistant": True, "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "heuristic", "assistant_confidence_threshold": 0.5,
    "prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2, "assistant_early_exit": 1,
    "assistant_lookbehind": 5, "target_lookbehind": 5, "assistant_ensemble_weight": 0.5,
    "speculation_type": "dflash", "disable_compile": True, "low_memory": True,
    "penalty_alpha": 0.5, "dola_layers": "low", "diversity_penalty": 1.0, "num_beam_groups": 2,
    "force_words_ids": [[3]], "constraints": [3], "prefill_chunk_size": 2,
    "continuous_batching_config": {"num_blocks": 3}, "transformers_version": "5",
}  # fmt: skip


def tiny() -> Any:
    return llama(num_hidden_layers=1, initializer_range=0.5)


def decoder(**settings: Any) -> ZipAR:
    return ZipAR(2, 3, window=3, options={"lowering": "eager"}, **settings)


def both(model: Any, zipar: ZipAR, prompt: Tensor = PROMPT, **settings: Any) -> tuple[Any, Any]:
    """By `zipar` and by `generate`: tokens, or the error."""
    results: list[Any] = []
    for more in ({"custom_generate": zipar}, {"max_new_tokens": TOKENS}):
        if "max_length" in settings:
            more.pop("max_new_tokens", None)
        try:
            result = model.generate(prompt, **USUAL | more | settings)
            results.append(result if isinstance(result, Tensor) else result.sequences)
        except Exception as error:
            results.append(error)
    return results[0], results[1]


def fields() -> list[str]:
    return [name for name in vars(GenerationConfig()) if not name.startswith("_")]


def test_every_field_of_the_config() -> None:
    """Also those that only a later version of transformers has: any value of them."""
    model, zipar = tiny(), decoder()
    accepted = set()
    for name in fields():
        # One prompt: assisted decoding takes no more.
        found, expected = both(model, zipar, PROMPT[:1], **{name: VALUES.get(name, 7)})
        if isinstance(found, Tensor):
            assert isinstance(expected, Tensor), f"{name}: {expected!r}"
            assert torch.equal(found, expected), name
            accepted.add(name)
        elif not isinstance(found, OptionError):
            assert type(found) is type(expected), f"{name}: {found!r}, {expected!r}"
    assert accepted >= {
        "suppress_tokens", "guidance_scale", "eos_token_id", "remove_invalid_values", "temperature",
        "return_dict_in_generate", "prompt_lookup_num_tokens", "prefill_chunk_size",
        "cache_implementation", "renormalize_logits",
    }  # fmt: skip


def test_a_setting_that_nobody_thought_of(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = GenerationConfig.__init__

    def later(self: Any, **settings: Any) -> None:
        self.sparkle = settings.pop("sparkle", None)
        plain(self, **settings)

    monkeypatch.setattr(GenerationConfig, "__init__", later)
    model, zipar = tiny(), decoder()
    model.generation_config.sparkle = None
    assert torch.equal(*both(model, zipar))
    with pytest.raises(OptionError, match="sparkle is 3"):
        model.generate(PROMPT, custom_generate=zipar, sparkle=3, **USUAL)


def test_no_field_is_in_two_tables() -> None:
    assert not known.CONSUMED & known.WITHOUT_EFFECT


def test_a_cache_that_rounds_is_refused() -> None:
    """`generate` itself needs another package for it."""
    config = tiny().generation_config
    config.cache_implementation = "quantized"
    with pytest.raises(OptionError, match="cache_implementation is 'quantized'"):
        known.check_config(config)


@pytest.mark.parametrize(
    ("mask", "positions"),
    [
        ([1, 0, 0, 1, 1], None), ([0, 0, 1, 1, 1], None), ([0, 1, 0, 1, 1], None),
        ([1, 1, 1, 1, 1], [0, 3, 6, 9, 12]), ([0, 1, 0, 1, 1], [7, 1, 7, 2, 5]),
    ],
)  # fmt: skip
def test_masks_and_positions(mask: list[int], positions: list[int] | None) -> None:
    """With holes, too."""
    model = tiny()
    settings: dict[str, Any] = {"attention_mask": torch.tensor([mask, [1, 1, 1, 1, 1]])}
    if positions is not None:
        settings["position_ids"] = torch.tensor([positions, [0, 1, 2, 3, 4]])
    found, expected = both(model, decoder(), **settings)
    assert torch.equal(found, expected)
    plain = model.generate(PROMPT, max_new_tokens=TOKENS, **USUAL)
    assert not torch.equal(expected, plain)


def test_other_kinds_of_tensors() -> None:
    model, zipar = tiny(), decoder()
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    for prompt, valid in ((PROMPT.int(), mask), (PROMPT, mask.bool()), (PROMPT, mask.float())):
        found, expected = both(model, zipar, prompt, attention_mask=valid)
        assert torch.equal(found, expected)
        assert found.dtype == expected.dtype


def test_negative_prompts() -> None:
    """Of any length, with padding."""
    model, zipar = tiny(), decoder()
    negative = torch.tensor([[12, 30, 8, 3, 4, 4, 2], [7, 7, 7, 3, 9, 1, 1]])
    seen = []
    for mask in (None, torch.tensor([[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 0, 1]])):
        settings = {"negative_prompt_ids": negative, "negative_prompt_attention_mask": mask}
        found, expected = both(model, zipar, guidance_scale=4.0, **settings)
        assert torch.equal(found, expected)
        seen.append(found)
        processor = UnbatchedClassifierFreeGuidanceLogitsProcessor(4.0, model, negative, mask)
        given = LogitsProcessorList([processor])
        assert torch.equal(
            model.generate(PROMPT, custom_generate=zipar, logits_processor=given, **USUAL), found
        )
    assert not torch.equal(*seen)


def test_guidance_that_is_refused() -> None:
    model, zipar = tiny(), decoder()
    by_another = UnbatchedClassifierFreeGuidanceLogitsProcessor(2.0, tiny())
    used = UnbatchedClassifierFreeGuidanceLogitsProcessor(2.0, model)
    model.generate(
        PROMPT, logits_processor=LogitsProcessorList([used]), max_new_tokens=1, **USUAL
    )  # fmt: skip
    twice = [UnbatchedClassifierFreeGuidanceLogitsProcessor(2.0, model) for _ in range(2)]
    for given, words in (
        ([by_another], "guidance by another model"), ([used], "was used before"),
        (twice, "given twice"), ([TemperatureLogitsWarper(2.0), twice[0]], "before the guidance"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=words):
            model.generate(
                PROMPT, custom_generate=zipar, logits_processor=LogitsProcessorList(given), **USUAL
            )
    with pytest.raises(OptionError, match="1 negative prompts for 2"):
        both_or_raise(model, zipar, guidance_scale=2.0, negative_prompt_ids=PROMPT[:1])


def both_or_raise(model: Any, zipar: ZipAR, **settings: Any) -> None:
    model.generate(PROMPT, custom_generate=zipar, **USUAL | settings)


def test_a_warper_of_the_same_name_is_not_known() -> None:
    class TemperatureLogitsWarper:
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return -scores

    given: Any = LogitsProcessorList([TemperatureLogitsWarper()])
    with pytest.raises(OptionError, match="TemperatureLogitsWarper looks at more"):
        both_or_raise(tiny(), decoder(), logits_processor=given)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_length": 8}, "max_length is 8"),
        ({"max_length": 50}, "max_length is 50"),
        ({"max_new_tokens": 7}, "max_new_tokens is 7"),
        ({"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(9)])}, "max_length is 9"),
        ({"prefix_allowed_tokens_fn": lambda batch, ids: [3]}, "as `allowed`.* as `end_of_line`"),
        ({"synced_gpus": True}, "synced_gpus is given"),
        ({"past_key_values": DynamicCache()}, "a cache .DynamicCache. is given"),
        ({"inputs_embeds": torch.zeros(2, 5, 32)}, "inputs_embeds"),
        ({"attention_mask": torch.eye(9)[:2]}, "attention mask is .2, 9."),
        ({"attention_mask": 3 * torch.ones(2, 5)}, "other values than 0 and 1"),
        ({"position_ids": torch.zeros(3, 2, 5)}, "position_ids are"),
        ({"output_attentions": True}, "output_attentions"),
        ({"min_new_tokens": 3, "eos_token_id": 7}, "asks for at least 3 of the 6"),
    ],
)
def test_refused_by_name(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(AccelError, match=words):
        both_or_raise(tiny(), decoder(), **settings)


def test_another_model_as_assistant_is_refused() -> None:
    with pytest.raises(OptionError, match="assistant_model is given"):
        both_or_raise(tiny(), decoder(), assistant_model=tiny())


def test_lengths_that_are_the_model_s_own() -> None:
    """They are meant for text, and do not have to be those of a picture."""
    model, zipar = tiny(), decoder()
    plain = model.generate(PROMPT, max_new_tokens=TOKENS, **USUAL)
    for name in ("max_length", "max_new_tokens"):
        setattr(model.generation_config, name, 100)
        assert torch.equal(model.generate(PROMPT, custom_generate=zipar, **USUAL), plain)
        setattr(model.generation_config, name, 7 if name == "max_length" else 2)
        with pytest.raises(OptionError, match=name):
            model.generate(PROMPT, custom_generate=zipar, **USUAL)
        setattr(model.generation_config, name, None)
    assert torch.equal(both(model, zipar, max_length=5 + TOKENS)[0], plain)


def test_a_token_ends_a_picture() -> None:
    """As in `generate`; and not where that is forbidden."""
    model, zipar = tiny(), decoder()
    plain = model.generate(PROMPT, max_new_tokens=TOKENS, **USUAL)[:, 5:]
    lengths = set()
    for end in {*plain.flatten().tolist()}:
        found, expected = both(model, zipar, eos_token_id=end)
        assert torch.equal(found, expected)
        lengths.add(found.shape[1])
    assert len(lengths) > 1
    end = int(plain[0, 0])
    found, expected = both(model, zipar, eos_token_id=end, min_new_tokens=TOKENS)
    assert torch.equal(found, expected)
    assert found.shape == (2, 5 + TOKENS)


class Streamer:
    """Of one's own: what it was given."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.given.append(value.tolist())

    def end(self) -> None:
        self.given.append("end")


def test_streamers() -> None:
    model = tiny()
    streamers = Streamer(), Streamer()
    model.generate(PROMPT[:1], custom_generate=decoder(), streamer=streamers[0], **USUAL)
    model.generate(PROMPT[:1], max_new_tokens=TOKENS, streamer=streamers[1], **USUAL)
    assert streamers[0].given == streamers[1].given


@pytest.mark.parametrize("adaptive", [False, True])
def test_scores_and_logits(adaptive: bool) -> None:
    model = tiny()
    settings: dict[str, Any] = {
        "output_scores": True, "output_logits": True, "return_dict_in_generate": True,
        "guidance_scale": 2.0, "suppress_tokens": [3, 4], "eos_token_id": 8,
    }  # fmt: skip
    zipar = decoder(adaptive=adaptive, unroll=4)
    found = model.generate(PROMPT, custom_generate=zipar, **USUAL | settings)
    expected = model.generate(PROMPT, max_new_tokens=TOKENS, **USUAL | settings)
    assert torch.equal(found.sequences, expected.sequences)
    for own, other in ((found.scores, expected.scores), (found.logits, expected.logits)):
        assert len(own) == len(other)
        torch.testing.assert_close(torch.stack(own), torch.stack(other), atol=1e-4, rtol=1e-4)
    with pytest.raises(OptionError, match="output_scores and output_logits: ends of lines"):
        both_or_raise(model, decoder(end_of_line=37), **settings)


def test_long_lists_are_told_apart() -> None:
    """Printed, the two are the same: torch leaves out what is in the middle."""
    model, zipar = llama(vocab_size=2400, num_hidden_layers=1), decoder()
    lists = [[0, 1, 2, *range(100, 1200), 2397, 2398, 2399],
             [0, 1, 2, *range(1100, 2200), 2397, 2398, 2399]]  # fmt: skip
    for tokens in lists:
        found, expected = both(model, zipar, suppress_tokens=tokens)
        assert torch.equal(found, expected)
        assert not bool(torch.isin(found[:, 5:], torch.tensor(tokens)).any())
    assert str(torch.tensor(lists[0]))[:20] == str(torch.tensor(lists[1]))[:20]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"window": 1.5}, "window is 1.5; needed is a whole number"),
        ({"window": "3"}, "window is '3'"),
        ({"rows": 2.0}, "rows is 2.0"),
        ({"columns": True}, "columns is True"),
        ({"unroll": 1.0}, "unroll is 1.0"),
        ({"end_of_line": -5}, "end_of_line is -5"),
        ({"end_of_line": "\n"}, "end_of_line is"),
        ({"allowed": [3.5]}, "allowed is"),
        ({"allowed": torch.ones(40, dtype=torch.bool)}, "allowed is torch.bool"),
        ({"allowed": 3}, "allowed is 3"),
        ({"progress": 3}, "progress is 3"),
    ],
)
def test_wrong_types(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        ZipAR(**{"rows": 2, "columns": 3, "window": 3} | settings)


def test_numbers_of_other_libraries() -> None:
    import numpy

    rows: Any = numpy.int64(2)
    columns: Any = torch.tensor(3)
    zipar = ZipAR(rows, columns, window=numpy.int32(3), allowed=numpy.arange(4))
    assert zipar.schedule.count == ZipAR(2, 3, window=3).schedule.count


def test_an_end_of_line_that_the_model_does_not_have() -> None:
    with pytest.raises(OptionError, match="end_of_line is 64; LlamaForCausalLM has the tokens 0"):
        both_or_raise(tiny(), decoder(end_of_line=64))


class TestJanus:
    PROMPTS = torch.tensor([[1, 5, 6, 7, 2], [1, 4, 4, 8, 2]])

    @pytest.mark.parametrize(
        "settings",
        [
            {"guidance_scale": 5.0, "temperature": 0.5}, {"guidance_scale": 3.0},
            {"attention_mask": torch.tensor([[1] * 5, [0, 1, 1, 1, 1]])},
            {"attention_mask": torch.tensor([[1] * 5, [1, 0, 0, 1, 1]])},
            {"max_length": 64}, {"renormalize_logits": True},
        ],
    )  # fmt: skip
    def test_as_its_own(self, settings: dict[str, Any]) -> None:
        model = janus()
        settings = {"do_sample": False, "attention_mask": torch.ones_like(self.PROMPTS)} | settings
        expected = model.generate(self.PROMPTS, generation_mode="image", **settings)
        zipar = ZipAR(4, 4, window=4, options={"lowering": "eager"})
        assert torch.equal(zipar.janus(model, self.PROMPTS, **settings), expected)

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"repetition_penalty": 1.5}, "RepetitionPenalty"),
            ({"suppress_tokens": [3]}, "SuppressTokensLogitsProcessor comes before the guidance"),
            ({"num_beams": 2}, "num_beams is 2"),
            ({"position_ids": torch.arange(5)[None]}, "position_ids"),
            ({"streamer": Streamer()}, "streamer"),
            ({"max_new_tokens": 9}, "max_new_tokens is 9"),
            ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
        ],
    )
    def test_refused(self, settings: dict[str, Any], words: str) -> None:
        zipar = ZipAR(4, 4, window=4, options={"lowering": "eager"})
        with pytest.raises(OptionError, match=words):
            zipar.janus(janus(), self.PROMPTS, do_sample=False, **settings)

    @pytest.mark.parametrize("grid", [(3, 4), (2, 8), (5, 5), (16, 1)])
    def test_other_grids(self, grid: tuple[int, int]) -> None:
        zipar = ZipAR(*grid, window=grid[1], options={"lowering": "eager"})
        with pytest.raises(OptionError, match="makes and decodes 4 by 4"):
            zipar.janus(janus(), self.PROMPTS)

    def test_other_models(self) -> None:
        zipar = ZipAR(4, 4, window=4, options={"lowering": "eager"})
        with pytest.raises(OptionError, match="is not Janus"):
            zipar.janus(llama(), self.PROMPTS)
