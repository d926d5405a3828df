"""Several decode steps with their sampling, as one module that `torch.compile` takes whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ....passes.zipar.raster import NOTHING, Raster
from .sampling import draw

__all__ = ["Decoder", "FixedDecoder", "Layout", "Sampler", "State"]


@dataclass(frozen=True)
class Layout:
    """Where tokens are, in the cache and in `known`: the prompt, padded on the left to `prompt`
    places, the picture in raster order, and one place for what a pass has no token for."""

    raster: Raster
    prompt: int

    @property
    def length(self) -> int:
        return self.prompt + self.raster.tokens + 1

    def place(self, index: Tensor) -> Tensor:
        """The places of a picture's tokens; of NOTHING the spare one."""
        return torch.where(index == NOTHING, self.length - 1, index + self.prompt)

    def start(
        self, prompts: Tensor, positions: Tensor, end_of_line: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What is known before the first pass; what of it has entered: all of the prompts
        [B, prompt] but for their last token, which enters the first pass; and the positions of all
        places, which go on from those of the prompts [B, prompt]."""
        known = pad(prompts, (0, self.length - self.prompt))
        if end_of_line is not None:
            place = torch.arange(self.length, device=known.device) - self.prompt
            ends = (place >= 0) & (place % self.raster.stride == self.raster.columns)
            known = known.masked_fill(ends, end_of_line)
        entered = pad(positions[:, :-1] >= 0, (0, self.length - self.prompt + 1))
        after = torch.arange(1, self.raster.tokens + 1, device=known.device)
        spare = torch.zeros_like(positions[:, -1:])
        return known, entered, torch.cat([positions, positions[:, -1:] + after, spare], 1)


class Sampler(nn.Module):
    """From logits to probabilities, and to tokens.

    warp: what transformers' processors do to scores [batch, vocabulary], or None. guidance: how
    strongly the second half of the batch, without the prompt, is left behind (classifier-free
    guidance): unconditional + guidance * (conditional - unconditional); None: no such half.
    allowed: bool [V], which tokens may be drawn. first: the token that the first logit is of.
    normalised: whether it is log-probabilities that are guided, not logits.
    """

    def __init__(
        self, sample: bool, warp: Callable[[Tensor], Tensor] | None, guidance: float | None,
        allowed: Tensor | None, first: int = 0, normalised: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.normalised = normalised
        self.first = first
        self.sample = sample
        self.warp = warp
        self.guidance = guidance
        self.allowed: Tensor | None
        self.register_buffer("allowed", allowed)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits [B or 2 B, N, V] to probabilities [B, N, V]; greedy ones are 0 and 1."""
        scores = self.scores(logits)
        if self.sample:
            return scores.softmax(-1)
        return nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).float()

    def scores(self, logits: Tensor) -> Tensor:
        """Logits [B or 2 B, N, V] to what probabilities are made of, [B, N, V]."""
        scores = logits.float()
        if self.normalised:
            scores = scores.log_softmax(-1)
        if self.guidance is not None:
            conditional, unconditional = scores.chunk(2)
            scores = unconditional + self.guidance * (conditional - unconditional)
        if self.allowed is not None:
            scores = scores.masked_fill(~self.allowed, -torch.inf)
        if self.warp is not None:
            scores = self.warp(scores.flatten(0, 1)).unflatten(0, scores.shape[:2])
        return scores


class State(NamedTuple):
    """What decoding carries from call to call.

    number: int64 [1], passes so far. known: int64 [B or 2 B, places], the tokens, see Layout.
    written: bool, as large, which of them have entered, so that the cache holds them. more: see the
    decoders. caches: keys and values of each layer in turn. records: of each pass of a call, where
    they are asked for: the places [B, N] that it asked for, their scores and logits [B, N, V].
    """

    number: Tensor
    known: Tensor
    written: Tensor
    more: tuple[Tensor, ...]
    caches: tuple[Tensor, ...]
    records: tuple[tuple[Tensor, ...], ...] = ()


class Decoder(nn.Module):
    """`unroll` passes over a state.

    step: see `DecodeStep`. records: whether the state has them.
    """

    records = False

    def __init__(
        self, step: nn.Module, layout: Layout, sampler: Sampler, unroll: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.step = step
        self.layout = layout
        self.sampler = sampler
        self.unroll = unroll
        self.hidden = torch.finfo(dtype).min
        self.dtype = dtype

    def forward(
        self, number: Tensor, known: Tensor, written: Tensor, positions: Tensor,
        random: tuple[Tensor, ...], more: tuple[Tensor, ...], *caches: Tensor,
    ) -> State:  # fmt: skip
        """positions: int64 [B or 2 B, places], see `Layout.start`; what is at a negative one is
        never seen. random: `draws`. caches: written to; they are those of the result."""
        state = State(number, known, written, more, caches)
        for _ in range(self.unroll):
            state = self.one_pass(state, positions, random)
        # Into the same memory: Inductor then writes a pass's few tokens instead of whole caches.
        kept = tuple(old.copy_(new) for old, new in zip(caches, state.caches, strict=True))
        return state._replace(caches=kept)

    def one_pass(self, state: State, positions: Tensor, random: tuple[Tensor, ...]) -> State:
        """The state after one more pass."""
        raise NotImplementedError

    def begin(self, batch: int, device: torch.device) -> tuple[Tensor, ...]:
        """`more` of the state before the first pass."""
        return ()

    def unfinished(self, state: State) -> Tensor:
        """Whether tokens are missing, bool [1]."""
        return state.number < self.most

    @property
    def most(self) -> int:
        """Passes that a picture takes at most."""
        return self.layout.raster.count

    def draws(self, batch: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of the random numbers in [0, 1) that a batch of pictures is drawn from: first one
        for each token."""
        return ((batch, self.layout.raster.tokens),)

    def rows(self, own: Tensor) -> Tensor:
        """What holds for a sample [B, ...], for all rows of the batch: [B or 2 B, ...]."""
        return own if self.sampler.guidance is None else own.repeat(2, 1)

    def of_picture(self, values: Tensor, places: Tensor) -> Tensor:
        """From values [B, tokens] of a picture's tokens those at places [B, N]."""
        index = places - self.layout.prompt
        return values.gather(1, index.clamp(max=values.shape[1] - 1))

    def recorded(
        self, state: State, places: Tensor, logits: Tensor
    ) -> tuple[tuple[Tensor, ...], ...]:
        """The state's records and those of a pass that asked for the tokens at places [B, N]."""
        if not self.records:
            return ()
        scores = self.sampler.scores(logits)
        return (*state.records, (places, scores, logits[: len(scores)].float()))

    def logits(
        self, state: State, slots: Tensor, sources: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Logits of the entries [B, T] of a pass; which slots are then written; the caches.

        An entry sees what comes before it in raster order, as far as that has entered by now.
        """
        slots, sources = self.rows(slots), self.rows(sources)
        fed = state.known.gather(1, sources)
        written = state.written.scatter(1, slots, True)
        place = torch.arange(self.layout.length, device=slots.device)
        visible = (written & (positions >= 0))[:, None] & (place <= slots[..., None])
        mask = torch.zeros(visible.shape, dtype=self.dtype, device=slots.device)
        mask = mask.masked_fill(~visible, self.hidden)[:, None]
        own = positions.gather(1, slots).clamp(min=0)
        logits, *caches = self.step(fed, own, mask, slots, *state.caches)
        return logits, written, tuple(caches)


class FixedDecoder(Decoder):
    """With a window that stays: what enters each pass is known beforehand."""

    slots: Tensor
    sources: Tensor
    targets: Tensor

    def __init__(
        self, step: nn.Module, layout: Layout, sampler: Sampler, unroll: int, dtype: torch.dtype
    ) -> None:
        super().__init__(step, layout, sampler, unroll, dtype)
        tables = layout.raster.tables(unroll)
        self.register_buffer("slots", layout.place(tables.slots))
        self.register_buffer("sources", layout.place(tables.sources))
        self.register_buffer("targets", layout.place(tables.targets))

    def one_pass(self, state: State, positions: Tensor, random: tuple[Tensor, ...]) -> State:
        (uniform,) = random
        batch = len(uniform)
        slots, sources, targets = (
            table.index_select(0, state.number).expand(batch, -1)
            for table in (self.slots, self.sources, self.targets)
        )
        logits, written, caches = self.logits(state, slots, sources, positions)
        probabilities = self.sampler.probabilities(logits)
        drawn = draw(probabilities, self.of_picture(uniform, targets)) + self.sampler.first
        known = state.known.scatter(1, self.rows(targets), self.rows(drawn))
        records = self.recorded(state, targets, logits)
        return State(state.number + 1, known, written, (), caches, records)
