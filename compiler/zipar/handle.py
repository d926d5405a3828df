"""`accel.ZipAR`: decodes the rows of a picture beside each other, for transformers' `generate`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ...kernels.errors import OptionError
from ...passes.base import PassResult
from ...passes.raster import Raster
from .decoder import AdaptiveDecoder, Decoder, FixedDecoder, Layout, Sampler, State
from .step import capture_step

__all__ = ["ZipAR"]

# What needs nothing but the scores of the token that is asked for.
WARPERS = (
    "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper",
    "TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper",
    "SuppressTokensLogitsProcessor", "LogitNormalization",
)  # fmt: skip
PROMPT = 16  # longer prompts are padded to a multiple, so that other lengths find a compiled graph


@dataclass(frozen=True)
class _Build:
    """A decoder for one model, batch and length of prompt."""

    layout: Layout
    run: Callable[..., State]
    vocabulary: int
    result: PassResult


class ZipAR:
    """Decoding of a picture of `rows` by `columns` tokens, several rows at a time.

        model.generate(prompt, custom_generate=accel.ZipAR(24, 24, window=6), do_sample=True)

    returns what `generate` returns: the prompt and the picture's tokens in raster order, without
    what a model may say after them. The model is captured once, rewritten (see `passes.zipar`), and
    compiled with `unroll` passes in one graph.

    window: tokens of a row that have to be there before the next row begins. `columns` decodes one
    token after the other; fewer take fewer passes, see `raster.count`, and see less of the row
    above. After ZipAR (arXiv 2412.04062).
    adaptive: whether the window widens until a row's first token passes the paper's test.
    end_of_line: the token that ends each row, for models that have one (Lumina-mGPT, Emu3); it is
    put in without being asked for. None: there is none (LlamaGen, Janus).
    row_start: without it, what stands in for the end of the row above, see `Raster`.
    allowed: the tokens that a picture is made of; None: all of the vocabulary.
    unroll: passes in one graph. options: of the backend, see `Options`.
    progress: called with the passes done, and how many there are at most.

    Raises OptionError for values out of range; and, before decoding, for what it can't do: beam
    search, models without a cache or with other layers than full attention, pictures beyond the
    model's positions, other logits processors than those that look at one token's scores.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        *,
        window: int,
        adaptive: bool = False,
        end_of_line: int | None = None,
        row_start: str = "latest",
        allowed: Sequence[int] | Tensor | None = None,
        unroll: int = 8,
        options: Mapping[str, Any] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if unroll < 1:
            raise OptionError(f"unroll is {unroll}; a call runs at least one pass")
        self.raster = Raster(rows, columns, window, end_of_line is not None, row_start)
        self.adaptive = adaptive
        self.end_of_line = end_of_line
        self.allowed = None if allowed is None else torch.as_tensor(allowed)
        self.unroll = unroll
        self.options = options
        self.progress = progress
        self.passes: Tensor | None = None  # of each sample of the last picture
        self._builds: weakref.WeakKeyDictionary[Any, dict[Any, _Build]] = (
            weakref.WeakKeyDictionary()
        )

    @property
    def schedule(self) -> Raster:
        """Which tokens enter a pass; `.passes`, and their `.count`."""
        return self.raster

    def report(self, model: Any) -> list[PassResult]:
        """What the pass did to a model, for each form in which it has been compiled."""
        return [build.result for build in self._builds.get(model, {}).values()]

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Sequence[Any] = (),
        stopping_criteria: Sequence[Any] = (),
        generation_config: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """As `generate` calls it."""
        config = generation_config if generation_config is not None else model.generation_config
        self._check_generation(config, stopping_criteria, model_kwargs)
        warpers, guidance, unconditional = _processors(logits_processor)
        mask = model_kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        prompts, valid = input_ids, mask
        if guidance is not None:
            without, known = unconditional
            without = input_ids[:, -1:] if without is None else without
            known = torch.ones_like(without) if known is None else known
            length = max(prompts.shape[1], without.shape[1])
            prompts, valid, without, known = (
                pad(each, (length - each.shape[1], 0)) for each in (prompts, valid, without, known)
            )
            prompts, valid = torch.cat([prompts, without]), torch.cat([valid, known])
        tokens = self._decode(model, prompts, valid, bool(config.do_sample), warpers, guidance)
        sequences = torch.cat([input_ids, tokens], 1)
        if config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences)
        return sequences

    def _check_generation(
        self, config: Any, stopping: Sequence[Any], others: Mapping[str, Any]
    ) -> None:
        if (config.num_beams or 1) > 1:
            raise OptionError(f"num_beams is {config.num_beams}; ZipAR samples, or takes the best")
        asked = config.max_new_tokens
        if asked is not None and asked != self.raster.tokens:
            raise OptionError(
                f"max_new_tokens is {asked}, but a picture of {self.raster.rows} by "
                f"{self.raster.columns} has {self.raster.tokens} tokens; leave it out"
            )
        for each in stopping:
            if not isinstance(each, (MaxLengthCriteria, EosTokenCriteria)):
                raise OptionError(
                    f"{type(each).__name__}: ZipAR stops after the picture and knows no other "
                    "stopping criterion"
                )
        if others.get("use_cache") is False:
            raise OptionError("use_cache is False; ZipAR decodes with a cache")
        known = {"attention_mask", "position_ids", "past_key_values", "use_cache",
                 "logits_to_keep"}  # fmt: skip
        given = {name: each for name, each in others.items() if name not in known}
        unknown = [name for name, each in given.items() if _holds_something(each)]
        if unknown:
            raise OptionError(
                f"{', '.join(unknown)}: ZipAR continues a prompt of tokens and takes no other "
                "inputs of the model"
            )
        past = others.get("past_key_values")
        if past is not None and past.get_seq_length() > 0:
            raise OptionError("past_key_values already holds tokens; ZipAR reads the prompt itself")

    def _decode(
        self, model: Any, prompts: Tensor, valid: Tensor, sample: bool, warpers: Sequence[Any],
        guidance: float | None,
    ) -> Tensor:  # fmt: skip
        """The tokens of pictures, int64 [B, tokens]; prompts are [B or 2 B, P], with guidance."""
        length = prompts.shape[1]
        if length < 1:
            raise OptionError("the prompt is empty; a picture begins after at least one token")
        if not bool(valid[:, -1].all()):
            raise OptionError("a prompt ends with padding; pad on the left")
        longer = -(-length // PROMPT) * PROMPT - length if length > 1 else 0
        prompts, valid = pad(prompts, (longer, 0)), pad(valid, (longer, 0))
        layout = Layout(self.raster, prompts.shape[1])
        _check_model(model, layout)
        padding = (valid == 0).sum(1)
        caches = _prefill(model, prompts, valid, layout)
        key = (
            len(prompts), layout.prompt, caches[0].dtype, caches[0].device, guidance, sample,
            *(f"{type(each).__name__} {sorted(vars(each).items())}" for each in warpers),
            getattr(model.config, "_attn_implementation", None),
        )  # fmt: skip
        builds = self._builds.setdefault(model, {})
        if key not in builds:
            builds[key] = self._build(model, caches, layout, sample, warpers, guidance)
        return self._run(builds[key], prompts, valid, padding, caches, guidance is not None)

    def _build(
        self, model: Any, caches: Sequence[Tensor], layout: Layout, sample: bool,
        warpers: Sequence[Any], guidance: float | None,
    ) -> _Build:  # fmt: skip
        raster = self.raster
        step, vocabulary, result = capture_step(model, caches, raster.width, raster.heads)
        allowed = self.allowed
        if allowed is not None:
            allowed = torch.zeros(vocabulary, dtype=torch.bool).index_fill(0, allowed, True)

        def warp(scores: Tensor) -> Tensor:
            for each in warpers:
                scores = each(None, scores)
            return scores

        sampler = Sampler(sample, warp if warpers else None, guidance, allowed)
        kind = AdaptiveDecoder if self.adaptive else FixedDecoder
        decoder: Decoder = kind(step, layout, sampler, self.unroll, caches[0].dtype)
        decoder.to(caches[0].device)
        run: Any = torch.compile(
            decoder, backend="accel", fullgraph=True, dynamic=False, isolate_recompiles=True,
            options=dict(self.options) if self.options else None,
        )  # fmt: skip
        return _Build(layout, run, vocabulary, result)

    def _run(
        self, build: _Build, prompts: Tensor, valid: Tensor, padding: Tensor,
        caches: tuple[Tensor, ...], guided: bool,
    ) -> Tensor:  # fmt: skip
        raster, layout, device = self.raster, build.layout, prompts.device
        batch = len(prompts) // 2 if guided else len(prompts)
        known = torch.zeros((len(prompts), layout.known), dtype=torch.long, device=device)
        known[:, 0] = prompts[:, -1]
        if self.end_of_line is not None:
            known[:, raster.stride : -1 : raster.stride] = self.end_of_line
        written = pad(valid.bool(), (0, layout.slots - layout.prompt))
        written[:, layout.prompt - 1] = False  # the prompt's last token enters the first pass
        uniform = torch.rand((batch, raster.tokens), device=device)
        most = raster.passes_with(raster.columns) if self.adaptive else raster.count
        calls = -(-most // self.unroll)
        more: tuple[Tensor, ...] = ()
        if self.adaptive:
            more = (
                torch.zeros((batch, raster.rows), dtype=torch.long, device=device),
                torch.zeros((batch, raster.rows), dtype=torch.bool, device=device),
                torch.zeros(batch, dtype=torch.bool, device=device),
                torch.zeros((batch, build.vocabulary), device=device),
                torch.rand((batch, 2 * calls * self.unroll), device=device),
                torch.zeros(batch, dtype=torch.long, device=device),
            )
        state = State(torch.zeros(1, dtype=torch.long, device=device), known, written, more, caches)
        for call in range(1, calls + 1):
            state = build.run(
                state.number, state.known, state.written, padding, uniform, state.more,
                *state.caches,
            )  # fmt: skip
            if self.progress is not None:
                self.progress(min(call * self.unroll, most), most)
            if self.adaptive and bool((state.more[0][:, -1] == raster.columns).all()):
                break
        count = state.more[-1] if self.adaptive else torch.full((batch,), raster.count)
        self.passes = count.cpu()
        return state.known[:batch, 1:-1]


def _holds_something(value: Any) -> bool:
    """`generate` hands on what it has not been given, too: None, or mappings of it."""
    if isinstance(value, Mapping):
        return any(map(_holds_something, value.values()))
    return value is not None


def _processors(
    processors: Sequence[Any],
) -> tuple[list[Any], float | None, tuple[Tensor | None, Tensor | None]]:
    """What to do to scores; the guidance's strength, and its prompt and which of it is valid."""
    warpers, guidance, without = [], None, (None, None)
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
    return warpers, guidance, without


def _check_model(model: Any, layout: Layout) -> None:
    """Raise OptionError for a model that can't be decoded so, before anything is computed."""
    name = type(model).__name__
    config = model.config.get_text_config()
    kinds = sorted(set(get_layer_types_and_kwargs(config)[0]))
    if kinds != ["full_attention"]:
        raise OptionError(
            f"{name} has layers of {', '.join(kinds)}; ZipAR needs full attention in all of them"
        )
    attention = getattr(config, "_attn_implementation", "sdpa")
    if attention not in ("sdpa", "eager"):
        raise OptionError(
            f"{name} has attention {attention!r}, which does not take a mask of its own for each "
            "token; call model.set_attn_implementation('sdpa')"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and layout.slots - 1 > positions:
        raise OptionError(
            f"a prompt of {layout.prompt} and a picture of {layout.raster.tokens} tokens do not "
            f"fit the {positions} positions of {name}"
        )


def _prefill(model: Any, prompts: Tensor, valid: Tensor, layout: Layout) -> tuple[Tensor, ...]:
    """Keys and values of each layer in turn, with the prompt in their first slots."""
    cache = DynamicCache(config=model.config)
    positions = (valid.long().cumsum(1) - 1).clamp(min=0)
    model(
        input_ids=prompts, attention_mask=valid, position_ids=positions, past_key_values=cache,
        use_cache=True, logits_to_keep=1,
    )  # fmt: skip
    rest = layout.slots - layout.prompt
    return tuple(
        pad(each, (0, 0, 0, rest)) for layer in cache.layers for each in (layer.keys, layer.values)
    )
