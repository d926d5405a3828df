"""Decoding with a window that adapts: what enters a pass depends on what was drawn."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ....passes.zipar.raster import NOTHING
from .decoder import Decoder, Layout, Sampler, State
from .sampling import accept, draw, residual

__all__ = ["AdaptiveDecoder"]


class _Entries(NamedTuple):
    """What enters a pass, [B, width]; the entries that ask for a token come first.

    rows: of the picture. slots, sources, targets: as in `passes.raster`. asks: whether an entry
    asks for a token. first: whether for a row's first one. whole: whether the row above is there.
    last: whether it is a row's last token.
    """

    rows: Tensor
    slots: Tensor
    sources: Tensor
    targets: Tensor
    asks: Tensor
    first: Tensor
    whole: Tensor
    fed: Tensor


class AdaptiveDecoder(Decoder):
    """With a window that widens, in each sample of the batch, until a row's first token stands.

    ZipAR (arXiv 2412.04062), section on the adaptive window: once the row above holds `window`
    tokens, a first token is drawn; with each further token of that row it is tested (`accept`),
    until it stands or that row is complete.

    more: held, int64 [B, rows], tokens that stand in each row; fed, bool [B, rows], whether a
    row's last token has entered; trying, bool [B], whether a first token is being tested; before,
    [B, V], the probabilities that it was drawn from; passes, int64 [B], that each sample took.
    """

    def __init__(
        self, step: nn.Module, layout: Layout, sampler: Sampler, unroll: int, dtype: torch.dtype,
        vocabulary: int,
    ) -> None:  # fmt: skip
        super().__init__(step, layout, sampler, unroll, dtype)
        self.vocabulary = vocabulary

    def begin(self, batch: int, device: torch.device) -> tuple[Tensor, ...]:
        rows = self.layout.raster.rows
        return (
            torch.zeros((batch, rows), dtype=torch.long, device=device),
            torch.zeros((batch, rows), dtype=torch.bool, device=device),
            torch.zeros(batch, dtype=torch.bool, device=device),
            torch.zeros((batch, self.vocabulary), device=device),
            torch.zeros(batch, dtype=torch.long, device=device),
        )

    def unfinished(self, state: State) -> Tensor:
        return (state.more[0][:, -1] < self.layout.raster.columns).any()[None]

    @property
    def most(self) -> int:
        return self.layout.raster.passes_with(self.layout.raster.columns)

    def draws(self, batch: int) -> tuple[tuple[int, ...], ...]:
        """And two for each pass: for the test, and for what is drawn where it fails."""
        return (*super().draws(batch), (batch, self.most + self.unroll, 2))

    def one_pass(self, state: State, positions: Tensor, random: tuple[Tensor, ...]) -> State:
        layout, first_token = self.layout, self.sampler.first
        uniform, tests = random
        held, fed, trying, before, passes = state.more
        batch = len(held)
        passes = passes + (held[:, -1] < layout.raster.columns)
        entries = self.entries(held, fed)
        logits, written, caches = self.logits(
            state, layout.place(entries.slots), layout.place(entries.sources), positions
        )
        probabilities = self.sampler.probabilities(logits)
        rows, targets, asks, first, whole = (
            each[:, : layout.raster.heads]
            for each in (entries.rows, entries.targets, entries.asks, entries.first, entries.whole)
        )
        place = layout.place(targets)
        drawn = draw(probabilities, self.of_picture(uniform, place))

        # Of a sample's rows one at most has its first token tested: that which comes last.
        which = first.float().argmax(1, keepdim=True)
        after = probabilities[torch.arange(batch, device=held.device), which[:, 0]]
        tried = state.known[:batch].gather(1, place.gather(1, which))[:, 0] - first_token
        test, again = tests.index_select(1, state.number)[:, 0].unbind(1)
        stands = accept(tried, before, after, test)
        decided = torch.where(stands, tried, draw(residual(before, after), again))
        tested = first & trying[:, None]
        drawn = torch.where(tested, decided[:, None], drawn)
        keeps = asks & (~first | whole | (tested & stands[:, None]))

        known = state.known.scatter(1, self.rows(place), self.rows(drawn + first_token))
        more = (
            held.scatter_add(1, rows, keeps.long()),
            entries.fed,
            (first & ~keeps).any(1),
            torch.where(first.any(1)[:, None], after, before),
            passes,
        )
        records = self.recorded(state, place, logits)
        return State(state.number + 1, known, written, more, caches, records)

    def entries(self, held: Tensor, fed: Tensor) -> _Entries:
        """Of the next pass, for what each row holds; as `Raster.passes` has it for a window that
        stays."""
        raster = self.layout.raster
        row = torch.arange(raster.rows, device=held.device)
        above = pad(held[:, :-1], (1, 0), value=raster.columns)
        ready = above >= raster.window
        if raster.first_row_alone:
            ready = torch.where(row == 1, above == raster.columns, ready)
        if not raster.end_of_line:
            # Before the next row has begun, a row's last token is what that begins with.
            fed = fed | ((held == raster.columns) & (pad(held[:, 1:], (0, 1)) == 0))
        asks = (held < raster.columns) & ((held > 0) | ready)
        last = (held == raster.columns) & ~fed & (row < raster.rows - 1)
        order = torch.where(asks, 0, torch.where(last, 1, 2)) * raster.rows + row
        rows = order.argsort(1)[:, : raster.width]
        slot = row * raster.stride + held - 1
        source = torch.where(held == 0, self._start(held, above), slot)
        first = asks & (held == 0)
        slot, source, asks, first, whole, last = (
            each.gather(1, rows)
            for each in (slot, source, asks, first, above == raster.columns, last)
        )
        slot, source = (torch.where(asks | last, each, NOTHING) for each in (slot, source))
        target = torch.where(asks, slot + 1, NOTHING)
        fed = fed.scatter(1, rows, fed.gather(1, rows) | last)
        return _Entries(rows, slot, source, target, asks, first, whole, fed)

    def _start(self, held: Tensor, above: Tensor) -> Tensor:
        """Whose token enters for the first of each row, [B, rows]."""
        raster = self.layout.raster
        row = torch.arange(raster.rows, device=held.device)
        slot = (row * raster.stride - 1).expand_as(held)
        if raster.end_of_line:
            return slot
        if raster.row_start == "latest":
            latest = (row - 1) * raster.stride + above - 1
            return torch.where(row == 0, slot, latest)
        done = torch.where(held == raster.columns, row, -1).cummax(1).values
        done = pad(done[:, :-1], (1, 0), value=-1)
        return torch.where(row == 0, slot, done * raster.stride + raster.columns - 1)
