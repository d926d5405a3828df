"""ZipAR's order of decoding: which tokens of a picture enter a pass together.

After ZipAR (arXiv 2412.04062): each pass gives every active row one token, and a row begins once
the row above holds `window` tokens. How rows begin, and how passes are counted, is in the paper's
released code for LlamaGen and Lumina.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.errors import OptionError

__all__ = ["NOTHING", "Entry", "Raster", "Tables", "whole"]

NOTHING = -2  # instead of an index, where a pass has fewer entries than the widest
ROW_STARTS = ("latest", "completed")


def whole(name: str, value: Any) -> int:
    """A whole number of any kind (of Python, numpy, torch). Raises OptionError for others."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise OptionError(f"{name} is {value!r}; needed is a whole number")


class Entry(NamedTuple):
    """One token that enters a pass. Indices are in raster order; -1 is the prompt's last token.

    slot: whose place it takes. source: whose token it is: `slot`, or a stand-in for a token that
    is not there yet. target: which token it predicts, or NOTHING.
    """

    slot: int
    source: int
    target: int


@dataclass(frozen=True)
class Tables:
    """The entries of all passes, padded to one width with NOTHING.

    slots, sources: int64 [passes, width]. targets: int64 [passes, heads]: those of the first
    entries of each pass; the others predict nothing.
    """

    slots: Tensor
    sources: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Raster:
    """A picture of `rows` by `columns` tokens, decoded row beside row.

    window: tokens of a row that have to be there before the next row begins; `columns` decodes one
    token after the other.
    end_of_line: whether each row ends with a token of its own, which is known beforehand and
    predicts the next row's first token.
    row_start: without it, what stands in for the end of the row above: its "latest" token (as in
    the code for LlamaGen), or the end of the last "completed" row (as in Pruna's for Janus).

    Raises OptionError for values out of range.
    """

    rows: int
    columns: int
    window: int
    end_of_line: bool = False
    row_start: str = "latest"
    first_row_alone: bool = False

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "window"):
            object.__setattr__(self, name, whole(name, getattr(self, name)))
        if self.rows < 1 or self.columns < 1:
            raise OptionError(
                f"a picture of {self.rows} rows and {self.columns} columns has no tokens; needed "
                "is at least 1 of each"
            )
        if not 1 <= self.window <= self.columns:
            raise OptionError(
                f"window is {self.window}; needed is a number from 1 to the {self.columns} columns"
            )
        if self.row_start not in ROW_STARTS:
            raise OptionError(
                f"row_start {self.row_start!r} is none of {', '.join(map(repr, ROW_STARTS))}"
            )
        if not self.end_of_line:
            object.__setattr__(self, "first_row_alone", True)

    @property
    def stride(self) -> int:
        """Tokens of a row, its end of line included."""
        return self.columns + self.end_of_line

    @property
    def tokens(self) -> int:
        """Tokens of a picture, ends of lines included."""
        return self.rows * self.stride

    def index(self, row: int, column: int) -> int:
        """A token's place in raster order."""
        return row * self.stride + column

    @property
    def count(self) -> int:
        """How many passes a picture takes, in closed form."""
        return self.passes_with(self.window)

    @property
    def adaptive_bound(self) -> int:
        """The fewest passes with a window that adapts from `window` on: a row's first token is
        drawn once and tested once."""
        return self.passes_with(min(self.window + 1, self.columns))

    def passes_with(self, lag: int) -> int:
        """Passes if each row begins `lag` passes after the one above."""
        if self.first_row_alone and self.rows > 1:
            return 2 * self.columns + (self.rows - 2) * lag
        return self.columns + (self.rows - 1) * lag

    def ready(self, row: int, above: int) -> bool:
        """Whether a row may begin, where the one above holds `above` tokens."""
        if row == 1 and self.first_row_alone:
            return above == self.columns
        return row == 0 or above >= self.window

    @cached_property
    def passes(self) -> tuple[tuple[Entry, ...], ...]:
        """The entries of every pass; those that predict a token come first."""
        held, fed = [0] * self.rows, [False] * self.rows
        passes = []
        while held[-1] < self.columns:
            before = tuple(held)
            asking, last = [], []
            for row, count in enumerate(before):
                if count == 0:
                    if row and not self.ready(row, before[row - 1]):
                        continue
                    slot = self.index(row, 0) - 1
                    asking.append(Entry(slot, self._start(row, before), slot + 1))
                elif count < self.columns:
                    slot = self.index(row, count - 1)
                    asking.append(Entry(slot, slot, slot + 1))
                else:
                    # Without ends of lines it may be what the next row begins with.
                    begins = not self.end_of_line and before[row + 1 : row + 2] == (0,)
                    if not fed[row] and not begins and row < self.rows - 1:
                        slot = self.index(row, count - 1)
                        last.append(Entry(slot, slot, NOTHING))
                    fed[row] = True
                    continue
                held[row] += 1
            passes.append((*asking, *last))
        return tuple(passes)

    def _start(self, row: int, held: tuple[int, ...]) -> int:
        """Whose token enters for a row's first."""
        slot = self.index(row, 0) - 1
        if row == 0 or self.end_of_line or held[row - 1] == self.columns:
            return slot
        if self.row_start == "latest":
            return self.index(row - 1, held[row - 1] - 1)
        done = max(above for above in range(row) if held[above] == self.columns)
        return self.index(done, self.columns - 1)

    @cached_property
    def width(self) -> int:
        """Entries of the widest pass."""
        return max(map(len, self.passes))

    @cached_property
    def heads(self) -> int:
        """Tokens that the widest pass predicts."""
        return max(sum(entry.target != NOTHING for entry in each) for each in self.passes)

    def tables(self, multiple: int = 1) -> Tables:
        """The passes as tensors, with empty ones at the end up to a multiple of `multiple`."""
        count = -(-len(self.passes) // multiple) * multiple
        slots = torch.full((count, self.width), NOTHING)
        sources, targets = slots.clone(), torch.full((count, self.heads), NOTHING)
        for number, entries in enumerate(self.passes):
            for place, entry in enumerate(entries):
                slots[number, place], sources[number, place] = entry.slot, entry.source
                if entry.target != NOTHING:
                    targets[number, place] = entry.target
        return Tables(slots, sources, targets)
