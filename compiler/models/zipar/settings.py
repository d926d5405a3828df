"""Settings of transformers' `generate`: each is consumed, without effect on a picture, or refused.

What is in none of the tables is refused where it differs from what transformers has by default, so
that a setting of a later version is not lost.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import logits_process
from transformers.generation.logits_process import (
    ClassifierFreeGuidanceLogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    SuppressTokensLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from ....kernels.errors import OptionError
from ....passes.zipar.raster import Raster
from .names import CACHE_NAMES

__all__ = [
    "Scores", "check_config", "check_model_inputs", "ends_of", "exact", "processors_of",
    "scores_of", "unseen",
]  # fmt: skip

# Fields of GenerationConfig that become logits processors or stopping criteria, which are looked
# at one by one (`scores_of`, `ends_of`); that `generate` acts on before it calls a decoding method;
# or that are read below and where a picture is returned.
CONSUMED = frozenset({
    "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "renormalize_logits", "forced_bos_token_id",
    "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty",
    "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "guidance_scale",
    "watermarking_config", "min_length", "min_new_tokens", "max_time", "stop_strings",
    "eos_token_id", "max_length", "max_new_tokens",
    "num_return_sequences", "token_healing", "bos_token_id", "pad_token_id",
    "do_sample", "use_cache", "num_beams", "return_dict_in_generate", "output_scores",
    "output_logits", "output_attentions", "output_hidden_states", "cache_implementation",
})  # fmt: skip
# Fields that can't change a picture: those of beams (there is one) and of encoders, how fast or in
# which pieces `generate` would compute, and drafts, which stand only if the model would say so.
WITHOUT_EFFECT = frozenset({
    "length_penalty", "early_stopping", "decoder_start_token_id", "cache_config", "max_cache_len",
    "prefill_chunk_size", "compile_config", "disable_compile", "prompt_lookup_num_tokens",
    "max_matching_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind",
    "assistant_ensemble_weight", "transformers_version",
})  # fmt: skip
# Caches that hold keys and values as they are.
LOSSLESS = (None, "dynamic", "dynamic_full", "static", "offloaded", "offloaded_static")
# Parameters of `generate` that reach a decoding method in some form.
HANDED_ON = frozenset({
    "self", "inputs", "generation_config", "logits_processor", "stopping_criteria",
    "prefix_allowed_tokens_fn", "negative_prompt_ids", "negative_prompt_attention_mask",
    "custom_generate", "kwargs", "streamer",
})  # fmt: skip
# Inputs of a model that `generate` makes itself.
MODEL_INPUTS = frozenset({"attention_mask", "position_ids", "use_cache", "logits_to_keep"})
# Processors that need nothing but the scores of the token that is asked for.
WARPERS = (
    "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper",
    "TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper",
    "SuppressTokensLogitsProcessor", "LogitNormalization", "InfNanRemoveLogitsProcessor",
)  # fmt: skip


def check_config(config: Any) -> None:
    """Raise OptionError for a GenerationConfig that asks for what ZipAR does not do."""
    fresh = GenerationConfig()
    usual = vars(fresh) | fresh._get_default_generation_params()
    for name in vars(fresh):  # what is beyond them, `generate` does not read
        value = getattr(config, name, None)
        if name in CONSUMED or name in WITHOUT_EFFECT or name.startswith("_"):
            continue
        if value is not None and value is not False and value != usual[name]:
            raise OptionError(f"{name} is {value!r}; ZipAR has no such setting, leave it out")
    if (config.num_beams or 1) > 1:
        raise OptionError(f"num_beams is {config.num_beams}; ZipAR samples, or takes the best")
    if config.use_cache is False:
        raise OptionError("use_cache is False; ZipAR decodes with a cache, leave it out")
    if config.cache_implementation not in LOSSLESS:
        raise OptionError(
            f"cache_implementation is {config.cache_implementation!r}; ZipAR has a cache of its "
            "own, of the model's precision; leave it out"
        )
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name):
            raise OptionError(
                f"{name}: several tokens share a pass, of which no such thing is kept; leave it out"
            )


def check_model_inputs(others: Mapping[str, Any]) -> None:
    """Raise OptionError for an input of the model beyond tokens, their mask and positions."""
    caches = [others[name] for name in CACHE_NAMES if others.get(name) is not None]
    for cache in caches:
        if getattr(cache, "_is_user_defined", False) or cache.get_seq_length() > 0:
            raise OptionError(
                f"a cache ({type(cache).__name__}) is given; ZipAR reads the prompt into one of "
                "its own, leave it out"
            )
    unknown = [
        name for name, each in others.items()
        if name not in MODEL_INPUTS and name not in CACHE_NAMES and _holds_something(each)
    ]  # fmt: skip
    if unknown:
        raise OptionError(
            f"{', '.join(unknown)}: ZipAR continues a prompt of tokens and takes no other inputs "
            "of the model"
        )


def _holds_something(value: Any) -> bool:
    """`generate` hands on what it has not been given, too: None, or mappings of it."""
    if isinstance(value, Mapping):
        return any(map(_holds_something, value.values()))
    return value is not None


def unseen(model: Any) -> Any:
    """The streamer that a running `generate` of the model was given, or None.

    `generate` hands a decoding method that is an object of the user's neither that nor
    assistant_model; so they are read where it runs. Raises OptionError for what else it was given
    and keeps to itself.
    """
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = sys._getframe(1)
    while frame.f_code is not code or frame.f_locals.get("self") is not model:
        if frame.f_back is None:
            return None
        frame = frame.f_back
    given = frame.f_locals
    for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
        value = given.get(name)
        if name not in HANDED_ON and value is not None and value is not False:
            raise OptionError(f"{name} is given; ZipAR has no such setting, leave it out")
    return given.get("streamer")


def ends_of(
    criteria: Sequence[Any], config: Any, model: Any, raster: Raster, prompt: int
) -> Tensor | None:
    """The tokens that end a picture early, int64 [N], or None.

    prompt: tokens of the prompt. Raises OptionError for a length that is not a picture's, and for
    other stopping criteria.
    """
    ends: list[Tensor] = []
    if not criteria and config.max_new_tokens is not None:  # not called by `generate`
        _check_length(prompt + config.max_new_tokens, config, model, raster, prompt)
    for each in criteria:
        if type(each) is MaxLengthCriteria:
            _check_length(int(each.max_length), config, model, raster, prompt)
        elif type(each) is EosTokenCriteria:
            ends.append(each.eos_token_id.flatten())
        else:
            raise OptionError(
                f"{type(each).__name__}: ZipAR stops after the picture, or where a token ends it, "
                "and knows no other stopping criterion; leave it out"
            )
    return torch.cat(ends) if ends else None


def _check_length(length: int, config: Any, model: Any, raster: Raster, prompt: int) -> None:
    """Refuse a length that is shorter than a picture, or longer and the caller's own wish."""
    needed, own = prompt + raster.tokens, model.generation_config
    given = length != config.max_length  # by a criterion of the caller's
    if config.max_new_tokens is not None and length == prompt + config.max_new_tokens:
        name, value = "max_new_tokens", config.max_new_tokens
        is_own = value == own.max_new_tokens
    else:
        name, value = "max_length", length
        # What `generate` puts in where no length is given.
        new = GenerationConfig._get_default_generation_params()["max_length"]
        most = getattr(model.config, "max_position_embeddings", None)
        usual = prompt + new if most is None else min(prompt + new, most)
        if own.max_length is None and not given and length == usual:
            return
        is_own = value == own.max_length and not given
    if length < needed or (length > needed and not is_own):
        raise OptionError(
            f"{name} is {value}, but a picture of {raster.rows} by {raster.columns} has "
            f"{raster.tokens} tokens after the prompt's {prompt}; leave it out, or give "
            f"max_new_tokens={raster.tokens}"
        )


@dataclass(frozen=True)
class Scores:
    """What is to be done to scores before a token is drawn.

    warpers: transformers' own processors, of one token's scores. guidance: its strength, or None;
    without: the prompt of what is left behind, int64 [B, Q], or None for the last token alone;
    valid: which of it is, or None for all. normalised: whether it is log-probabilities that are
    guided, not logits.
    """

    warpers: tuple[Any, ...] = ()
    guidance: float | None = None
    without: Tensor | None = None
    valid: Tensor | None = None
    normalised: bool = False


def scores_of(processors: Sequence[Any], model: Any, raster: Raster, prompt: int) -> Scores:
    """What logits processors ask for. Raises OptionError for those that ZipAR can't follow."""
    known = {getattr(logits_process, name, None) for name in WARPERS} - {None}
    warpers: list[Any] = []
    guidance: Any = None
    for each in processors:
        kind = type(each)
        if kind in (
            UnbatchedClassifierFreeGuidanceLogitsProcessor, ClassifierFreeGuidanceLogitsProcessor
        ):  # fmt: skip
            if warpers:
                raise OptionError(
                    f"{type(warpers[0]).__name__} comes before the guidance; ZipAR does to scores "
                    "what comes after it"
                )
            if guidance is not None:
                raise OptionError(
                    "guidance is given twice, by guidance_scale and as a logits processor (or by "
                    "two of them); leave one out"
                )
            guidance = each
        elif kind in known:
            warpers.append(each)
        elif kind in (MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor):
            warpers += _without_ends(each, raster, prompt)
        elif kind is PrefixConstrainedLogitsProcessor:
            raise OptionError(
                "prefix_allowed_tokens_fn reads all tokens before, but a picture's rows are "
                "decoded beside each other; give ZipAR the tokens of a picture as `allowed`, and "
                "the one that ends a row as `end_of_line`"
            )
        else:
            raise OptionError(
                f"the logits processor {kind.__name__} looks at more than one token's scores, or "
                f"is not known; ZipAR knows {', '.join(WARPERS)}, and guidance_scale"
            )
    return Scores(tuple(warpers), **_guidance(guidance, model))


def _guidance(processor: Any, model: Any) -> dict[str, Any]:
    if processor is None:
        return {}
    scale = float(processor.guidance_scale)
    if type(processor) is ClassifierFreeGuidanceLogitsProcessor:
        return {"guidance": scale}
    if processor.model is not model:
        raise OptionError(
            f"guidance by another model ({type(processor.model).__name__}) than the one that "
            "generates; give the processor that one"
        )
    context = processor.unconditional_context
    if not context["first_pass"]:
        raise OptionError("the guidance's logits processor was used before; make a new one")
    return {
        "guidance": scale, "without": context["input_ids"], "valid": context["attention_mask"],
        "normalised": True,
    }  # fmt: skip


def _without_ends(processor: Any, raster: Raster, prompt: int) -> list[Any]:
    """What keeps a picture from ending early, at all of its tokens alike."""
    if type(processor) is MinLengthLogitsProcessor:
        name, asked = "min_length", processor.min_length - prompt
    else:
        before = prompt - processor.prompt_length_to_skip
        name, asked = "min_new_tokens", processor.min_new_tokens - before
    if 0 < asked < raster.tokens:
        raise OptionError(
            f"{name} asks for at least {asked} of the {raster.tokens} tokens of a picture; ZipAR "
            f"can keep it from ending early at all of them or at none: give min_new_tokens="
            f"{raster.tokens}, or leave it out"
        )
    ends = processor.eos_token_id
    return (
        [SuppressTokensLogitsProcessor(ends.flatten().tolist(), ends.device)] if asked > 0 else []
    )


def exact(value: Any) -> Any:
    """Something that is equal for equal values only, and can be a key. Raises OptionError for
    values that can't be told apart so."""
    if isinstance(value, Tensor):
        kind = (str(value.dtype), str(value.device), tuple(value.shape))
        return ("tensor", *kind, tuple(value.flatten().tolist()))
    if isinstance(value, Mapping):
        return ("mapping", *((exact(key), exact(each)) for key, each in value.items()))
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *map(exact, value))
    if value is None or isinstance(value, (bool, int, float, str)):
        return (type(value).__name__, value)
    raise OptionError(
        f"a setting holds a {type(value).__name__}, of which ZipAR can't say whether it is the "
        "same as in a picture before; give numbers, or lists or tensors of them"
    )


def processors_of(config: Any, model: Any, input_ids: Tensor, own: Sequence[Any]) -> Sequence[Any]:
    """The logits processors that transformers makes of a config, with a caller's own."""
    made: Sequence[Any] = model._get_logits_processor(
        generation_config=config, input_ids_seq_length=input_ids.shape[1],
        encoder_input_ids=input_ids, prefix_allowed_tokens_fn=None,
        logits_processor=LogitsProcessorList(own), device=input_ids.device,
    )  # fmt: skip
    return made
