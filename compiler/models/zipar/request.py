"""What a call of `generate` asks for, checked before anything is computed."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.generation.logits_process import ClassifierFreeGuidanceLogitsProcessor

from ....kernels.errors import OptionError
from ....passes.zipar.raster import Raster
from .janus import JanusPictures, check_grid
from .settings import (
    check_config,
    check_model_inputs,
    ends_of,
    exact,
    processors_of,
    scores_of,
)

__all__ = ["HIDDEN", "Request", "janus_request", "language_request", "positions_of"]

LENGTHS = 16  # prompts are padded to a multiple, so that other lengths find a compiled graph
MODEL_TAKES = ("input_ids", "position_ids", "attention_mask", "use_cache", "logits_to_keep")
HIDDEN = -1  # instead of a position, where nothing looks


@dataclass(frozen=True)
class Request:
    """What is to be decoded.

    owner: the user's model; model: that, or a view of it. prompts: int64 [B or 2 B, P]; with
    guidance its second half is without what is to be followed. positions: int64, as large, HIDDEN
    where there is padding. sample: whether tokens are drawn, or the likeliest taken. processors:
    transformers' own, of scores. guidance: its strength or None; normalised: whether of
    log-probabilities. first: the token that the first logit is of. records: whether scores and
    logits are asked for. ends: the tokens that end a picture, int64 [N], or None; filler: what
    comes after such a one.
    """

    owner: Any
    model: Any
    prompts: Tensor
    positions: Tensor
    sample: bool
    processors: tuple[Any, ...]
    guidance: float | None
    normalised: bool = False
    first: int = 0
    records: bool = False
    ends: Tensor | None = None
    filler: int | None = None

    @property
    def batch(self) -> int:
        """How many pictures."""
        return len(self.prompts) // (1 if self.guidance is None else 2)

    @property
    def valid(self) -> Tensor:
        """Which of the prompts is not padding, int64."""
        return (self.positions != HIDDEN).long()

    @property
    def key(self) -> tuple[Any, ...]:
        """Requests with the same key can share a compiled decoder, where the model is the same."""
        return (
            tuple(self.prompts.shape), self.sample, self.guidance, self.normalised, self.records,
            *((type(each).__name__, exact(vars(each))) for each in self.processors),
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
        if bool((self.positions[:, -1] == HIDDEN).any()):
            raise OptionError("a prompt ends with padding; pad on the left")
        _check_model(self.owner, self.model, int(self.positions.max()) + 1 + raster.tokens)
        more = -length % LENGTHS if fill and length > 1 else 0
        prompts, positions = _filled(self.prompts, self.positions, more)
        return dataclasses.replace(self, prompts=prompts, positions=positions)


def _filled(prompts: Tensor, positions: Tensor, more: int) -> tuple[Tensor, Tensor]:
    return pad(prompts, (more, 0)), pad(positions, (more, 0), value=HIDDEN)


def positions_of(mask: Tensor) -> Tensor:
    """Positions as `generate` counts them, of a mask [B, P]; HIDDEN where that is 0."""
    shown = mask != 0
    return torch.where(shown, shown.long().cumsum(1) - 1, HIDDEN)


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
    prompts = _prompts(input_ids)
    batch, length = prompts.shape
    check_config(config)
    check_model_inputs(others)
    ends = ends_of(stopping_criteria, config, model, raster, length)
    scores = scores_of(logits_processor, model, raster, length)
    mask = _mask(others.get("attention_mask"), prompts)
    positions = positions_of(mask)
    given = others.get("position_ids")
    if given is not None:
        if given.shape not in ((batch, length), (1, length)) or given.is_floating_point():
            raise OptionError(
                f"position_ids are {given.dtype} {list(given.shape)}; needed are whole numbers "
                f"{[batch, length]}, one for each token of the prompt"
            )
        if bool((given < 0).any()):
            raise OptionError("position_ids are below 0; needed are positions from 0 on")
        positions = torch.where(mask != 0, given.to(positions), HIDDEN)
    if scores.guidance is not None:
        without = prompts[:, -1:] if scores.without is None else _prompts(scores.without)
        if len(without) != batch:
            raise OptionError(
                f"{len(without)} negative prompts for {batch} pictures; give one for each "
                "(num_return_sequences makes several pictures of a prompt)"
            )
        known = _mask(scores.valid, without)
        # Transformers counts the positions of these by their places, padding or not.
        places = torch.arange(without.shape[1], device=without.device)
        places = torch.where(known != 0, places, HIDDEN)
        width = max(length, without.shape[1])
        both = [
            _filled(each, place, width - each.shape[1])
            for each, place in ((prompts, positions), (without.to(prompts), places))
        ]
        prompts, positions = map(torch.cat, zip(*both, strict=True))
    filler = getattr(config, "_pad_token_tensor", None)
    records = bool(config.return_dict_in_generate) and bool(
        config.output_scores or config.output_logits
    )
    if records and raster.end_of_line:
        raise OptionError(
            "output_scores and output_logits: ends of lines are put in and have none; leave them "
            "out"
        )
    return Request(
        model, model, prompts, positions, bool(config.do_sample), scores.warpers, scores.guidance,
        scores.normalised, records=records, ends=ends,
        filler=None if filler is None else int(filler),
    ).checked(raster, fill)  # fmt: skip


def _prompts(input_ids: Tensor) -> Tensor:
    if input_ids.dim() != 2 or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise OptionError(
            f"prompts are {input_ids.dtype} {list(input_ids.shape)}; needed are tokens, whole "
            "numbers [batch, length]"
        )
    return input_ids.long()


def _mask(mask: Tensor | None, prompts: Tensor) -> Tensor:
    if mask is None:
        return torch.ones_like(prompts)
    if mask.shape != prompts.shape:
        raise OptionError(
            f"the attention mask is {list(mask.shape)}; needed is {list(prompts.shape)}, 1 for "
            "each token of a prompt and 0 for padding"
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise OptionError("the attention mask has other values than 0 and 1, which ZipAR needs")
    return mask.to(prompts.device)


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
    check_grid(model, raster)
    config, others = model._prepare_generation_config(generation_config, **settings)
    check_config(config)
    unknown = [name for name, each in others.items() if each is not None]
    if unknown:
        raise OptionError(
            f"{', '.join(unknown)}: Janus makes pictures of a prompt of tokens and its mask, and "
            "takes no such setting for them; leave it out"
        )
    asked = config.max_new_tokens
    if asked is not None and asked != raster.tokens:
        raise OptionError(
            f"max_new_tokens is {asked}, but a picture of {raster.rows} by {raster.columns} has "
            f"{raster.tokens} tokens; leave it out"
        )
    if config.return_dict_in_generate and (config.output_scores or config.output_logits):
        raise OptionError("output_scores and output_logits: Janus gives none, leave them out")
    guidance = 5.0 if config.guidance_scale is None else float(config.guidance_scale)
    config.guidance_scale = None  # it has another meaning for transformers' own processors
    own = list(logits_processor)
    if guidance > 1:
        own.append(ClassifierFreeGuidanceLogitsProcessor(guidance))
    model._prepare_special_tokens(config, attention_mask is not None, device=input_ids.device)
    prompts = _prompts(input_ids)
    processors = processors_of(config, model, prompts, own)
    scores = scores_of(processors, model, raster, prompts.shape[1])
    mask = _mask(attention_mask, prompts)
    prompts, mask = (
        each.repeat_interleave(config.num_return_sequences or 1, 0) for each in (prompts, mask)
    )
    if scores.guidance is not None:
        kept = (config.bos_token_id, config.generation_kwargs["boi_token_id"])
        is_kept = torch.isin(prompts, torch.tensor(kept, device=prompts.device))
        without = torch.where(is_kept, prompts, config.pad_token_id)
        prompts, mask = torch.cat([prompts, without]), mask.repeat(2, 1)
    # By their places, padding or not, as its own `generate` has it.
    places = torch.arange(prompts.shape[1], device=prompts.device)
    pictures = JanusPictures(model)
    request = Request(
        model, pictures, prompts, torch.where(mask != 0, places, HIDDEN), bool(config.do_sample),
        scores.warpers, scores.guidance, first=pictures.first,
    )  # fmt: skip
    return request.checked(raster, fill), config


def _attention(model: Any) -> str:
    return str(getattr(model.config.get_text_config(), "_attn_implementation", "sdpa"))


def _check_model(owner: Any, model: Any, tokens: int) -> None:
    """Raise OptionError for a model that can't be decoded so, before anything is computed."""
    name = type(owner).__name__
    if owner.config.is_encoder_decoder:
        raise OptionError(f"{name} has an encoder; ZipAR needs a model that is a decoder alone")
    parameters = inspect.signature(model.forward).parameters
    if not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        missing = [each for each in MODEL_TAKES if each not in parameters]
        if missing:
            raise OptionError(
                f"the forward of {name} takes no {' and no '.join(missing)}; ZipAR needs models "
                "that do"
            )
    config = owner.config.get_text_config()
    kinds = sorted(set(get_layer_types_and_kwargs(config)[0]))
    if kinds != ["full_attention"]:
        raise OptionError(
            f"{name} has layers of {', '.join(kinds)}; ZipAR needs full attention in all of them"
        )
    attention = _attention(owner)
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
