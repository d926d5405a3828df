"""What ZipAR is compared to, on the same captured step: other rules of decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ....compiler.models.zipar import ZipAR
from ....compiler.models.zipar.decoder import Decoder, FixedDecoder, Layout, Sampler, State
from ....compiler.models.zipar.sampling import accept, draw, residual
from ....passes.zipar.raster import Raster

__all__ = ["Jacobi", "Released"]


class _ReleasedDecoder(FixedDecoder):
    def logits(
        self, state: State, slots: Tensor, sources: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        return super().logits(
            state._replace(written=torch.ones_like(state.written)), slots, sources, positions
        )


class Released(ZipAR):
    """ZipAR with the mask of the paper's released code for LlamaGen: every place before a token is
    visible, also where nothing has been written yet."""

    def decoder_for(self, *shared: Any) -> Decoder:
        return _ReleasedDecoder(*shared[:-1])


class _JacobiDecoder(Decoder):
    """Speculative Jacobi decoding (Teng et al. 2024, arXiv 2410.01699), from its description.

    All of the next `width` tokens are drafts; a pass gives the distribution of each after the
    drafts before it. Drafts stand, from the first on, by the test of speculative sampling; where it
    fails a token is drawn again, and all after it are drafted anew from what this pass says.

    more: done, int64 [B], tokens that stand; before, [B, tokens + width, V], what each draft was
    drawn from; passes, int64 [B].
    """

    known_before: Tensor

    def __init__(
        self, step: Any, layout: Layout, sampler: Sampler, unroll: int, dtype: torch.dtype,
        vocabulary: int,
    ) -> None:  # fmt: skip
        super().__init__(step, layout, sampler, unroll, dtype)
        self.vocabulary = vocabulary
        self.width = layout.raster.width
        index = torch.arange(layout.raster.tokens + self.width)
        # No token is at the place `columns` of a row without ends of lines.
        self.register_buffer("known_before", index % layout.raster.stride == layout.raster.columns)

    def begin(self, batch: int, device: torch.device) -> tuple[Tensor, ...]:
        tokens = self.layout.raster.tokens + self.width
        # The first drafts are all token 0, for certain; most of them fail the test.
        drafted = torch.zeros((batch, tokens, self.vocabulary), device=device)
        drafted[..., 0] = 1.0
        none = torch.zeros(batch, dtype=torch.long, device=device)
        return none, drafted, none.clone()

    def unfinished(self, state: State) -> Tensor:
        return (state.more[0] < self.layout.raster.tokens).any()[None]

    @property
    def most(self) -> int:
        return self.layout.raster.tokens

    def draws(self, batch: int) -> tuple[tuple[int, ...], ...]:
        return (*super().draws(batch), (batch, self.most + self.unroll, self.width, 2))

    def one_pass(self, state: State, positions: Tensor, random: tuple[Tensor, ...]) -> State:
        layout, width = self.layout, self.width
        done, before, passes = state.more
        passes = passes + (done < layout.raster.tokens)
        offset = torch.arange(width, device=done.device)
        index = done[:, None] + offset  # of the drafts
        inside = index < layout.raster.tokens
        spare = layout.length - 1
        place = torch.where(inside, index + layout.prompt, spare)
        feeding = torch.where(inside, index - 1 + layout.prompt, spare)
        logits, written, caches = self.logits(state, feeding, feeding, positions)
        after = self.sampler.probabilities(logits)
        drafts = state.known.gather(1, place)
        # Ends of lines are known: certain, whatever the model says.
        sure = self.known_before[index]
        certain = one_hot(drafts, self.vocabulary).float()
        after = torch.where(sure[..., None], certain, after)
        rows = index[..., None].expand(-1, -1, self.vocabulary)
        old = torch.where(sure[..., None], certain, before.gather(1, rows))
        pair = random[1].index_select(1, state.number)[:, 0]
        stands = accept(drafts, old, after, pair[..., 0]) | ~inside
        accepted = stands.long().cumprod(1)
        count = accepted.sum(1)
        failed = offset == count[:, None]
        again = torch.where(failed, draw(residual(old, after), pair[..., 1]),
                            draw(after, pair[..., 1]))  # fmt: skip
        tokens = torch.where((accepted > 0) | sure, drafts, again)
        known = state.known.scatter(1, place, tokens)
        before = before.scatter(1, rows, after)
        done = (done + count + (count < width)).clamp(max=layout.raster.tokens)
        return State(state.number + 1, known, written, (done, before, passes), caches)


@dataclass(frozen=True)
class _Drafts(Raster):
    """As many entries a pass as there are drafts, all of which predict a token."""

    drafts: int = 1

    @property
    def width(self) -> int:
        return self.drafts

    @property
    def heads(self) -> int:
        return self.drafts


class Jacobi(ZipAR):
    """Speculative Jacobi decoding with `window` drafts; the grid is only for the ends of lines."""

    def __init__(self, rows: int, columns: int, *, window: int, **settings: Any) -> None:
        super().__init__(rows, columns, window=columns, adaptive=True, **settings)
        lines = self.raster.end_of_line
        self.raster = _Drafts(rows, columns, columns, lines, drafts=window)

    def decoder_for(self, *shared: Any) -> Decoder:
        return _JacobiDecoder(*shared)
