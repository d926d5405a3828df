"""What a call of `generate` asks for, checked before anything is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.generation.logits_process import (
    LogitsProcessorList,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from ...kernels.errors import OptionError
from ...passes.zipar.raster import Raster
from .janus import JanusPictures

__all__ = ["Request", "janus_request", "language_request"]

# What needs nothing but the scores of the token that is asked for.
WARPERS = (
    "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper",
    "TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper",
    "SuppressTokensLogitsProcessor", "LogitNormalization",
)  # fmt: skip
LENGTHS = 16  # prompts are padded to a multiple, so that other lengths find a compiled graph
TAKEN = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}


@dataclass(frozen=True)
class Request:
    """What is to be decoded.

    owner: the user's model; model: that, or a view of it. prompts: int64 [B or 2 B, P], and which
    of it is valid; with guidance its second half is without what is to be followed. sample:
    whether tokens are drawn, or the likeliest taken. processors: transformers' own, of scores.
    first: the token that the first logit is of.
    """

    owner: Any
    model: Any
    prompts: Tensor
    valid: Tensor
    sample: bool
    processors: tuple[Any, ...]
    guidance: float | None
    first: int = 0

    @property
    def batch(self) -> int:
        """How many pictures."""
        return len(self.prompts) // (1 if self.guidance is None else 2)

    @property
    def key(self) -> tuple[Any, ...]:
        """Requests with the same key can share a compiled decoder."""
        parameter = next(self.owner.parameters())
        return (
            tuple(self.prompts.shape), self.sample, self.guidance, parameter.dtype,
            parameter.device, _attention(self.model),
            *(f"{type(each).__name__} {sorted(vars(each).items())}" for each in self.processors),
        )  # fmt: skip

    @property
    def warp(self) -> Callable[[Tensor], Tensor] | None:
        """What the processors do to scores [batch, vocabulary]."""
        processors = self.processors

        def warp(scores: Tensor) -> Tensor:
            for each in processors:
                scores = each(None, scores)
            return scores

        return warp if processors else None

    def checked(self, raster: Raster, fill: bool = True) -> Request:
        """With its prompts filled to a common length. Raises OptionError where it can't be."""
        length = self.prompts.shape[1]
        if length < 1:
            raise OptionError("the prompt is empty; a picture begins after at least one token")
        if not bool(self.valid[:, -1].all()):
            raise OptionError("a prompt ends with padding; pad on the left")
        _check_model(self.owner, length + raster.tokens)
        more = -length % LENGTHS if fill and length > 1 else 0
        return dataclasses.replace(
            self, prompts=pad(self.prompts, (more, 0)), valid=pad(self.valid, (more, 0))
        )


def language_request(
    raster: Raster,
    model: Any,
    input_ids: Tensor,
    logits_processor: Sequence[Any],
    stopping_criteria: Sequence[Any],
    config: Any,
    others: Mapping[str, Any],
    fill: bool = True,
) -> Request:
    """Of what `generate` hands to a decoding method. Raises OptionError for what is not known.

    fill: whether prompts are made longer, so that others share the compiled graph.
    """
    _check_generation(raster, config, stopping_criteria, others)
    processors, guidance, (without, known) = _split(logits_processor)
    mask = others.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    prompts, valid = input_ids, mask
    if guidance is not None:
        without = input_ids[:, -1:] if without is None else without
        known = torch.ones_like(without) if known is None else known
        length = max(prompts.shape[1], without.shape[1])
        prompts, valid, without, known = (
            pad(each, (length - each.shape[1], 0)) for each in (prompts, valid, without, known)
        )
        prompts, valid = torch.cat([prompts, without]), torch.cat([valid, known])
    sample = bool(config.do_sample)
    return Request(model, model, prompts, valid, sample, processors, guidance).checked(raster, fill)


def janus_request(
    raster: Raster,
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    logits_processor: Sequence[Any],
    generation_config: Any,
    settings: Mapping[str, Any],
    fill: bool = True,
) -> tuple[Request, Any]:
    """Of what Janus' own `generate` takes, which has no place for a decoding method; and the
    generation's config. fill: see `language_request`."""
    config, others = model._prepare_generation_config(generation_config, **settings)
    _check_generation(raster, config, (), others)
    guidance = 5.0 if config.guidance_scale is None else float(config.guidance_scale)
    config.guidance_scale = None  # it has another meaning for transformers' own processors
    model._prepare_special_tokens(config, attention_mask is not None, device=input_ids.device)
    processors = model._get_logits_processor(
        generation_config=config, input_ids_seq_length=input_ids.shape[1],
        encoder_input_ids=input_ids, prefix_allowed_tokens_fn=None,
        logits_processor=LogitsProcessorList(logits_processor), device=input_ids.device,
    )  # fmt: skip
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    prompts, valid = (
        each.repeat_interleave(config.num_return_sequences or 1, 0) for each in (input_ids, mask)
    )
    if guidance > 1:
        kept = (config.bos_token_id, config.generation_kwargs["boi_token_id"])
        is_kept = torch.isin(prompts, torch.tensor(kept, device=prompts.device))
        without = torch.where(is_kept, prompts, config.pad_token_id)
        prompts, valid = torch.cat([prompts, without]), torch.cat([valid, valid])
    pictures = JanusPictures(model)
    request = Request(
        model, pictures, prompts, valid, bool(config.do_sample), _split(processors)[0],
        guidance if guidance > 1 else None, pictures.first,
    )  # fmt: skip
    return request.checked(raster, fill), config


def _check_generation(
    raster: Raster, config: Any, stopping: Sequence[Any], others: Mapping[str, Any]
) -> None:
    if (config.num_beams or 1) > 1:
        raise OptionError(f"num_beams is {config.num_beams}; ZipAR samples, or takes the best")
    asked = config.max_new_tokens
    if asked is not None and asked != raster.tokens:
        raise OptionError(
            f"max_new_tokens is {asked}, but a picture of {raster.rows} by {raster.columns} has "
            f"{raster.tokens} tokens; leave it out"
        )
    for each in stopping:
        if not isinstance(each, (MaxLengthCriteria, EosTokenCriteria)):
            raise OptionError(
                f"{type(each).__name__}: ZipAR stops after the picture and knows no other "
                "stopping criterion"
            )
    if others.get("use_cache") is False:
        raise OptionError("use_cache is False; ZipAR decodes with a cache")
    given = {name: each for name, each in others.items() if name not in TAKEN}
    unknown = [name for name, each in given.items() if _holds_something(each)]
    if unknown:
        raise OptionError(
            f"{', '.join(unknown)}: ZipAR continues a prompt of tokens and takes no other inputs "
            "of the model"
        )
    past = others.get("past_key_values")
    if past is not None and past.get_seq_length() > 0:
        raise OptionError("past_key_values already holds tokens; ZipAR reads the prompt itself")


def _holds_something(value: Any) -> bool:
    """`generate` hands on what it has not been given, too: None, or mappings of it."""
    if isinstance(value, Mapping):
        return any(map(_holds_something, value.values()))
    return value is not None


def _split(
    processors: Sequence[Any],
) -> tuple[tuple[Any, ...], float | None, tuple[Any, Any]]:
    """What to do to scores; the guidance's strength, and its prompt and which of it is valid."""
    warpers: list[Any] = []
    guidance: float | None = None
    without: Any = None, None
    for each in processors:
        name = type(each).__name__
        if isinstance(each, UnbatchedClassifierFreeGuidanceLogitsProcessor):
            if warpers:
                raise OptionError(f"guidance comes after {type(warpers[0]).__name__}, not before")
            guidance = float(each.guidance_scale)
            context = each.unconditional_context
            without = context["input_ids"], context["attention_mask"]
        elif name in WARPERS:
            warpers.append(each)
        else:
            raise OptionError(
                f"the logits processor {name} looks at more than one token's scores, or is not "
                f"known; ZipAR knows {', '.join(WARPERS)}, and guidance_scale"
            )
    return tuple(warpers), guidance, without


def _attention(model: Any) -> str:
    return str(getattr(model.config.get_text_config(), "_attn_implementation", "sdpa"))


def _check_model(model: Any, tokens: int) -> None:
    """Raise OptionError for a model that can't be decoded so, before anything is computed."""
    name = type(model).__name__
    config = model.config.get_text_config()
    kinds = sorted(set(get_layer_types_and_kwargs(config)[0]))
    if kinds != ["full_attention"]:
        raise OptionError(
            f"{name} has layers of {', '.join(kinds)}; ZipAR needs full attention in all of them"
        )
    attention = _attention(model)
    if attention not in ("sdpa", "eager"):
        raise OptionError(
            f"{name} has attention {attention!r}, which does not take a mask of its own for each "
            "token; call model.set_attn_implementation('sdpa')"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise OptionError(
            f"a prompt and a picture of together {tokens} tokens do not fit the {positions} "
            f"positions of {name}"
        )
