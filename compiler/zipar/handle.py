"""`accel.ZipAR`: decodes the rows of a picture beside each other, for transformers' `generate`."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ...kernels.errors import OptionError
from ...passes.base import PassResult
from ...passes.zipar.raster import Raster
from ..export import Engine, export
from .adaptive import AdaptiveDecoder
from .decoder import Decoder, FixedDecoder, Layout, Sampler, State
from .picture import Picture
from .request import Request, janus_request, language_request
from .step import capture_step

__all__ = ["ZipAR"]

JANUS_TAKES = ("attention_mask", "logits_processor", "generation_config")


@dataclass(frozen=True)
class _Build:
    """A decoder for requests of one key."""

    decoder: Decoder
    run: Callable[..., State]
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
    first_row_alone: whether the second row waits for all of the first. Worth its passes for models
    with ends of lines; without them it is so in any case. See `Raster`.
    allowed: the tokens that a picture is made of; None: all of the vocabulary.
    unroll: passes in one graph; small models gain from 4 (measured: a tenth of the time of a pass
    of 1.4 ms), large ones only compile longer. options: of the backend, see `Options`.
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
        first_row_alone: bool = False,
        allowed: Sequence[int] | Tensor | None = None,
        unroll: int = 1,
        options: Mapping[str, Any] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if unroll < 1:
            raise OptionError(f"unroll is {unroll}; a call runs at least one pass")
        self.raster = Raster(
            rows, columns, window, end_of_line is not None, row_start, first_row_alone
        )
        self.adaptive = adaptive
        self.end_of_line = end_of_line
        self.allowed = None if allowed is None else torch.as_tensor(allowed)
        if self.allowed is not None and self.allowed.numel() == 0:
            raise OptionError("allowed is empty; a picture is made of at least one token")
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
        request = language_request(
            self.raster, model, input_ids, logits_processor, stopping_criteria, config,
            model_kwargs,
        )  # fmt: skip
        return _returned(config, torch.cat([input_ids, self._decode(request)], 1))

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
        [B, rows * columns], or that within what `return_dict_in_generate` asks for.
        """
        self._refuse_ends_of_lines()
        request, config = janus_request(
            self.raster, model, input_ids, attention_mask, logits_processor, generation_config,
            settings,
        )  # fmt: skip
        return _returned(config, self._decode(request) - request.first)

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
            request = language_request(
                self.raster, model, input_ids, logits_processor, stopping_criteria,
                generation_config, others, fill=False,
            )  # fmt: skip
            engines.append(self._export(request, path))
            return input_ids

        model.generate(input_ids, custom_generate=write, **settings)
        return engines[0]

    def _refuse_ends_of_lines(self) -> None:
        if self.end_of_line is not None:
            raise OptionError("Janus' pictures have no ends of lines; leave end_of_line out")

    def _export(self, request: Request, path: str | os.PathLike[str]) -> Engine:
        layout = Layout(self.raster, request.prompts.shape[1])
        caches = _prefill(request, layout)
        decoder, _ = self._decoder(request, caches, layout)
        picture = Picture(decoder, self.end_of_line, [each.shape for each in caches])
        random = [torch.rand(each) for each in decoder.draws(request.batch)]
        return export(
            picture, (request.prompts, request.valid, *random), path=path, free_sizes=False,
            options={"pade": False, "outline": False},
        )  # fmt: skip

    def _decode(self, request: Request) -> Tensor:
        """The tokens of pictures, int64 [B, tokens]."""
        layout = Layout(self.raster, request.prompts.shape[1])
        caches = _prefill(request, layout)
        builds = self._builds.setdefault(request.owner, {})
        if request.key not in builds:
            decoder, result = self._decoder(request, caches, layout)
            compiling: Any = torch.compile  # its stubs lack isolate_recompiles
            run = compiling(
                decoder, backend="accel", fullgraph=True, dynamic=False, isolate_recompiles=True,
                options=dict(self.options) if self.options else None,
            )  # fmt: skip
            builds[request.key] = _Build(decoder, run, result)
        return self._run(builds[request.key], request, caches)

    def _decoder(
        self, request: Request, caches: Sequence[Tensor], layout: Layout
    ) -> tuple[Decoder, PassResult]:
        raster = self.raster
        step, vocabulary, result = capture_step(request.model, caches, raster.width, raster.heads)
        allowed = self.allowed
        if allowed is not None:
            if not bool(((allowed >= 0) & (allowed < vocabulary)).all()):
                raise OptionError(
                    f"allowed has tokens up to {int(allowed.max())} and from {int(allowed.min())}; "
                    f"the model predicts 0 to {vocabulary - 1}"
                )
            allowed = torch.zeros(vocabulary, dtype=torch.bool).index_fill(0, allowed, True)
        sampler = Sampler(request.sample, request.warp, request.guidance, allowed, request.first)
        decoder = self.decoder_for(step, layout, sampler, self.unroll, caches[0].dtype, vocabulary)
        return decoder.to(caches[0].device).eval(), result

    def decoder_for(
        self, step: torch.nn.Module, layout: Layout, sampler: Sampler, unroll: int,
        dtype: torch.dtype, vocabulary: int,
    ) -> Decoder:  # fmt: skip
        """The rule of decoding; another one can be put in its place."""
        if self.adaptive:
            return AdaptiveDecoder(step, layout, sampler, unroll, dtype, vocabulary)
        return FixedDecoder(step, layout, sampler, unroll, dtype)

    def _run(self, build: _Build, request: Request, caches: tuple[Tensor, ...]) -> Tensor:
        decoder, prompts = build.decoder, request.prompts
        device, batch = prompts.device, request.batch
        random = tuple(torch.rand(shape, device=device) for shape in decoder.draws(batch))
        padding = (request.valid == 0).sum(1)
        known, written = decoder.layout.start(prompts, request.valid, self.end_of_line)
        number = torch.zeros(1, dtype=torch.long, device=device)
        state = State(number, known, written, decoder.begin(batch, device), caches)
        for call in range(-(-decoder.most // self.unroll)):
            state = build.run(
                state.number, state.known, state.written, padding, random, state.more,
                *state.caches,
            )  # fmt: skip
            if self.progress is not None:
                self.progress(min((call + 1) * self.unroll, decoder.most), decoder.most)
            if self.adaptive and not bool(decoder.unfinished(state)):
                break
        count = state.more[-1] if self.adaptive else torch.full((batch,), decoder.most)
        self.passes = count.cpu()
        return state.known[:batch, decoder.layout.prompt : -1]


def _returned(config: Any, sequences: Any) -> Any:
    if config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=sequences)
    return sequences


def _prefill(request: Request, layout: Layout) -> tuple[Tensor, ...]:
    """Keys and values of each layer in turn, with the prompts in their first places."""
    cache: Any = DynamicCache(config=request.owner.config)
    positions = (request.valid.long().cumsum(1) - 1).clamp(min=0)
    request.model(
        input_ids=request.prompts, attention_mask=request.valid, position_ids=positions,
        past_key_values=cache, use_cache=True, logits_to_keep=1,
    )  # fmt: skip
    rest = layout.length - layout.prompt
    return tuple(
        pad(each, (0, 0, 0, rest)) for layer in cache.layers for each in (layer.keys, layer.values)
    )
