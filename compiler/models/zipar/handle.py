"""`accel.ZipAR`: decodes the rows of a picture beside each other, for transformers' `generate`."""

from __future__ import annotations

import operator
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ....kernels.errors import OptionError
from ....passes.base import PassResult
from ....passes.zipar.raster import Raster, whole
from ...export import Engine, export
from .adaptive import AdaptiveDecoder
from .decoder import Decoder, FixedDecoder, Layout, Sampler, State
from .names import cache_name
from .picture import Picture
from .request import Request, janus_request, language_request, positions_of
from .settings import unseen
from .step import DecodeStep, StepCapture

__all__ = ["ZipAR"]

JANUS_TAKES = ("attention_mask", "logits_processor", "generation_config")


@dataclass(frozen=True)
class _Builds:
    """Of one model.

    captures: its step, by the shape of the prompts. decoders: by the request's key and the step
    as it was captured, and each compiled.
    """

    captures: dict[Any, StepCapture] = field(default_factory=dict)
    decoders: dict[tuple[Any, DecodeStep], tuple[Decoder, Callable[..., State]]] = field(
        default_factory=dict
    )


@dataclass(frozen=True)
class _Drawn:
    """What was decoded.

    tokens: int64 [B, N]; with ends of a picture, no longer than the longest one. scores, logits:
    a tensor [B, V] for each token, or None.
    """

    tokens: Tensor
    scores: Any = None
    logits: Any = None


class ZipAR:
    """Decoding of a picture of `rows` by `columns` tokens, several rows at a time.

        model.generate(prompt, custom_generate=accel.ZipAR(24, 24, window=6), do_sample=True)

    returns what `generate` returns: the prompt and the picture's tokens in raster order, without
    what a model may say after them; a token of eos_token_id ends a picture early, so give `allowed`
    or min_new_tokens where that may not be. The model is captured, rewritten (see `passes.zipar`),
    and compiled with `unroll` passes in one graph; once for each state in which it is met, such as
    adapters on and off (see `StepCapture`). Settings of `generate` count as they do there, or are
    refused; a streamer gets the tokens in raster order, once all are there; and
    return_dict_in_generate gives sequences, scores and logits, but no cache.

    window: tokens of a row that have to be there before the next row begins. `columns` decodes one
    token after the other; fewer take fewer passes, see `raster.count`, and see less of the row
    above. After ZipAR (arXiv 2412.04062).
    adaptive: whether the window widens until a row's first token passes the paper's test.
    end_of_line: the token that ends each row, for models that have one (Lumina-mGPT, Emu3); it is
    put in without being asked for. None: there is none (LlamaGen, Janus).
    row_start: without it, what stands in for the end of the row above, see `Raster`.
    first_row_alone: whether the second row waits for all of the first. Worth its passes for models
    with ends of lines; without them it is so in any case. See `Raster`.
    allowed: the tokens that a picture is made of; None: all of the vocabulary.
    unroll: passes in one graph; small models gain from 4 (measured: a tenth of the time of a pass
    of 1.4 ms), large ones only compile longer. options: of the backend, see `Options`.
    progress: called with the passes done, and how many there are at most.

    Raises OptionError for values of another type or out of range; and, before decoding, for what it
    can't do: beam search, models without a cache or with other layers than full attention, pictures
    beyond the model's positions, other logits processors than those that look at one token's
    scores, and settings of `generate` that it does not know.
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
        first_row_alone: bool = False,
        allowed: Sequence[int] | Tensor | None = None,
        unroll: int = 1,
        options: Mapping[str, Any] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.raster = Raster(
            rows, columns, window, end_of_line is not None, row_start, first_row_alone
        )
        self.adaptive = adaptive
        self.end_of_line = None if end_of_line is None else _token(end_of_line)
        self.allowed = None if allowed is None else _tokens(allowed)
        unroll = whole("unroll", unroll)
        if unroll < 1:
            raise OptionError(f"unroll is {unroll}; a call runs at least one pass")
        if progress is not None and not callable(progress):
            raise OptionError(f"progress is {progress!r}; needed is a function, or None")
        self.unroll = unroll
        self.options = options
        self.progress = progress
        self.passes: Tensor | None = None  # of each sample of the last picture
        self._builds: weakref.WeakKeyDictionary[Any, _Builds] = weakref.WeakKeyDictionary()

    @property
    def schedule(self) -> Raster:
        """Which tokens enter a pass; `.passes`, and their `.count`."""
        return self.raster

    def report(self, model: Any) -> list[PassResult]:
        """What the pass did to a model, for each form in which it has been compiled."""
        builds = self._builds.get(model)
        return [] if builds is None else [step.result for _, step in builds.decoders]

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
        streamer = unseen(model)
        request = language_request(
            self.raster, model, input_ids, logits_processor, stopping_criteria, config,
            model_kwargs,
        )  # fmt: skip
        self._check_end_of_line(model)
        drawn = self._decode(request)
        if streamer is not None:
            for token in drawn.tokens.cpu().unbind(1):
                streamer.put(token)
            streamer.end()
        return _returned(config, torch.cat([input_ids, drawn.tokens], 1), drawn)

    @torch.no_grad()
    def janus(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        logits_processor: Sequence[Any] = (),
        generation_config: Any = None,
        **settings: Any,
    ) -> Any:
        """Pictures by Janus, as its own `generate(generation_mode="image")` returns them.

        input_ids: int64 [B, P], prompts that end with the token that begins a picture. settings:
        of the generation, such as do_sample and guidance_scale. Returns codes, int64
        [B, rows * columns], or that within what `return_dict_in_generate` asks for. Raises
        OptionError for another grid than the model's, too.
        """
        self._refuse_ends_of_lines()
        request, config = janus_request(
            self.raster, model, input_ids, attention_mask, logits_processor, generation_config,
            settings,
        )  # fmt: skip
        drawn = self._decode(request)
        return _returned(config, drawn.tokens - request.first, drawn)

    @torch.no_grad()
    def export(
        self,
        model: Any,
        input_ids: Tensor,
        *,
        path: str | os.PathLike[str],
        **settings: Any,
    ) -> Engine:
        """Write an engine that decodes whole pictures, and load it.

        input_ids, settings: an example of what `generate` is given; the batch, the length of the
        prompt and how tokens are drawn are fixed by it. path: see `accel.export`. The engine takes
        input_ids and attention_mask, int64 [B, P] (with guidance [2 B, P], the second half without
        what is to be followed), and random numbers in [0, 1): uniform, [B, tokens], and for an
        adaptive window tests, [B, passes, 2]; it returns tokens, int64 [B, tokens].
        Janus' pictures: with generation_mode="image", as its own `generate` has it; the engine
        returns codes. What is not to be followed is there the prompt with padding in the place of
        all tokens but that of the beginning and that which begins a picture, all of it valid.
        """
        if settings.get("generation_mode") == "image":
            del settings["generation_mode"]
            self._refuse_ends_of_lines()
            given = [settings.pop(name, None) for name in JANUS_TAKES]
            request, _ = janus_request(
                self.raster, model, input_ids, given[0], given[1] or (), given[2], settings,
                fill=False,
            )  # fmt: skip
            return self._export(request, path)
        engines: list[Engine] = []

        def write(
            model: Any, input_ids: Tensor, logits_processor: Sequence[Any],
            stopping_criteria: Sequence[Any], generation_config: Any, **others: Any,
        ) -> Tensor:  # fmt: skip
            if unseen(model) is not None:
                raise OptionError("a streamer is given; an engine returns a whole picture at once")
            request = language_request(
                self.raster, model, input_ids, logits_processor, stopping_criteria,
                generation_config, others, fill=False,
            )  # fmt: skip
            self._check_end_of_line(model)
            own = request.positions[: request.batch]
            if not torch.equal(own, positions_of(own + 1)):
                raise OptionError(
                    "position_ids are given; an engine counts them from the attention mask"
                )
            engines.append(self._export(request, path))
            return input_ids

        model.generate(input_ids, custom_generate=write, **settings)
        return engines[0]

    def _check_end_of_line(self, model: Any) -> None:
        tokens = model.get_input_embeddings().weight.shape[0]
        if self.end_of_line is not None and self.end_of_line >= tokens:
            raise OptionError(
                f"end_of_line is {self.end_of_line}; {type(model).__name__} has the tokens 0 to "
                f"{tokens - 1}"
            )

    def _refuse_ends_of_lines(self) -> None:
        if self.end_of_line is not None:
            raise OptionError("Janus' pictures have no ends of lines; leave end_of_line out")

    def _export(self, request: Request, path: str | os.PathLike[str]) -> Engine:
        layout = Layout(self.raster, request.prompts.shape[1])
        caches = _prefill(request, layout)
        decoder = self._decoder(request, self._capture()(request.model, caches), caches, layout)
        picture = Picture(decoder, self.end_of_line, [each.shape for each in caches])
        random = [torch.rand(each) for each in decoder.draws(request.batch)]
        return export(
            picture, (request.prompts, request.valid, *random), path=path, free_sizes=False,
            options={"pade": False, "outline": False},
        )  # fmt: skip

    def _decode(self, request: Request) -> _Drawn:
        layout = Layout(self.raster, request.prompts.shape[1])
        caches = _prefill(request, layout)
        builds = self._builds.setdefault(request.owner, _Builds())
        shape = tuple(request.prompts.shape)
        if shape not in builds.captures:
            builds.captures[shape] = self._capture()
        step = builds.captures[shape](request.model, caches)
        key = (request.key, step)
        if key not in builds.decoders:
            decoder = self._decoder(request, step, caches, layout)
            compiling: Any = torch.compile  # its stubs lack isolate_recompiles
            run = compiling(
                decoder, backend="accel", fullgraph=True, dynamic=False, isolate_recompiles=True,
                options=dict(self.options) if self.options else None,
            )  # fmt: skip
            builds.decoders[key] = decoder, run
        decoder, run = builds.decoders[key]
        return self._run(decoder, run, request, caches)

    def _capture(self) -> StepCapture:
        return StepCapture(self.raster.width, self.raster.heads)

    def _decoder(
        self, request: Request, step: DecodeStep, caches: Sequence[Tensor], layout: Layout
    ) -> Decoder:
        vocabulary = step.vocabulary
        allowed = self.allowed
        if allowed is not None:
            if not bool(((allowed >= 0) & (allowed < vocabulary)).all()):
                raise OptionError(
                    f"allowed has tokens up to {int(allowed.max())} and from {int(allowed.min())}; "
                    f"the model predicts 0 to {vocabulary - 1}"
                )
            allowed = torch.zeros(vocabulary, dtype=torch.bool).index_fill(0, allowed, True)
        sampler = Sampler(
            request.sample, request.warp, request.guidance, allowed, request.first,
            request.normalised,
        )  # fmt: skip
        decoder = self.decoder_for(
            step.module, layout, sampler, self.unroll, caches[0].dtype, vocabulary
        )
        decoder.records = request.records
        return decoder.to(caches[0].device).eval()

    def decoder_for(
        self, step: torch.nn.Module, layout: Layout, sampler: Sampler, unroll: int,
        dtype: torch.dtype, vocabulary: int,
    ) -> Decoder:  # fmt: skip
        """The rule of decoding; another one can be put in its place."""
        if self.adaptive:
            return AdaptiveDecoder(step, layout, sampler, unroll, dtype, vocabulary)
        return FixedDecoder(step, layout, sampler, unroll, dtype)

    def _run(
        self, decoder: Decoder, run: Callable[..., State], request: Request,
        caches: tuple[Tensor, ...],
    ) -> _Drawn:  # fmt: skip
        prompts, layout = request.prompts, decoder.layout
        device, batch = prompts.device, request.batch
        random = tuple(torch.rand(shape, device=device) for shape in decoder.draws(batch))
        known, written, positions = layout.start(prompts, request.positions, self.end_of_line)
        number = torch.zeros(1, dtype=torch.long, device=device)
        state = State(number, known, written, decoder.begin(batch, device), caches)
        records: list[Tensor] = []  # scores and logits [B, tokens + 1, V], the last ones spare
        for call in range(-(-decoder.most // self.unroll)):
            state = run(
                state.number, state.known, state.written, positions, random, state.more,
                *state.caches,
            )  # fmt: skip
            for places, *values in state.records:
                if not records:
                    shape = (batch, layout.raster.tokens + 1, values[0].shape[-1])
                    records = [each.new_zeros(shape) for each in values]
                index = (places - layout.prompt)[..., None].expand_as(values[0])
                for record, each in zip(records, values, strict=True):
                    record.scatter_(1, index, each)
            if self.progress is not None:
                self.progress(min((call + 1) * self.unroll, decoder.most), decoder.most)
            if self.adaptive and not bool(decoder.unfinished(state)):
                break
        count = state.more[-1] if self.adaptive else torch.full((batch,), decoder.most)
        self.passes = count.cpu()
        tokens = _ended(state.known[:batch, layout.prompt : -1], request)
        taken = (each[:, : tokens.shape[1]].unbind(1) for each in records)
        return _Drawn(tokens, *taken)


def _token(value: Any) -> int:
    token = whole("end_of_line", value)
    if token < 0:
        raise OptionError(f"end_of_line is {token}; needed is a token, from 0 on")
    return token


def _tokens(values: Iterable[int] | Tensor) -> Tensor:
    """Tokens as int64 [N]. Raises OptionError for what is none."""
    try:
        tokens = values if isinstance(values, Tensor) else torch.tensor(
            [operator.index(each) for each in values], dtype=torch.long
        )  # fmt: skip
    except TypeError as error:
        raise OptionError(f"allowed is {values!r}; needed are tokens, whole numbers") from error
    if tokens.is_floating_point() or tokens.dtype == torch.bool or tokens.dim() != 1:
        raise OptionError(
            f"allowed is {tokens.dtype} {list(tokens.shape)}; needed are tokens, whole numbers [N]"
        )
    if tokens.numel() == 0:
        raise OptionError("allowed is empty; a picture is made of at least one token")
    return tokens.long().cpu()


def _ended(tokens: Tensor, request: Request) -> Tensor:
    """Pictures [B, N] as `generate` returns those that a token ended: filled up after it, and no
    longer than the longest one."""
    if request.ends is None:
        return tokens
    ended = torch.isin(tokens, request.ends.to(tokens)).long().cumsum(1)
    over = (ended - torch.isin(tokens, request.ends.to(tokens)).long()) > 0
    if not bool(over.any()):
        return tokens
    if request.filler is None:
        raise OptionError("a token ended a picture early, and no pad_token_id is given to fill it")
    longest = int((~over).sum(1).max())
    return tokens.masked_fill(over, request.filler)[:, :longest]


def _returned(config: Any, sequences: Any, drawn: _Drawn) -> Any:
    if not config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(
        sequences=sequences,
        scores=drawn.scores if config.output_scores else None,
        logits=drawn.logits if config.output_logits else None,
    )


def _prefill(request: Request, layout: Layout) -> tuple[Tensor, ...]:
    """Keys and values of each layer in turn, with the prompts in their first places."""
    cache: Any = DynamicCache(config=request.owner.config)
    given = {cache_name(request.model): cache}
    request.model(
        input_ids=request.prompts, attention_mask=request.valid,
        position_ids=request.positions.clamp(min=0), use_cache=True, logits_to_keep=1, **given,
    )  # fmt: skip
    rest = layout.length - layout.prompt
    return tuple(
        pad(each, (0, 0, 0, rest)) for layer in cache.layers for each in (layer.keys, layer.values)
    )
