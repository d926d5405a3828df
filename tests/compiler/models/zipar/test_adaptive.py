"""What enters a pass where the window adapts, against the schedule of one that stays."""

import torch
from accel.compiler.models.zipar.adaptive import AdaptiveDecoder
from accel.compiler.models.zipar.decoder import Layout, Sampler
from accel.passes.zipar.raster import NOTHING, Entry, Raster
from hypothesis import given
from hypothesis import strategies as st
from torch import nn


@given(
    st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.booleans(),
    st.sampled_from(["latest", "completed"]), st.booleans(),
)  # fmt: skip
def test_entries_are_those_of_the_schedule(
    rows: int, columns: int, window: int, lines: bool, start: str, alone: bool
) -> None:
    """Where every first token stands at once."""
    raster = Raster(rows, columns, min(window, columns), lines, start, alone)
    sampler = Sampler(False, None, None, None)
    decoder = AdaptiveDecoder(nn.Identity(), Layout(raster, 1), sampler, 1, torch.float32, 8)
    held, fed, *_ = decoder.begin(1, torch.device("cpu"))
    for expected in raster.passes:
        entries = decoder.entries(held, fed)
        columns_of = (entries.slots[0], entries.sources[0], entries.targets[0])
        found = [Entry(*map(int, each)) for each in zip(*columns_of, strict=True)]
        assert [each for each in found if each.slot != NOTHING] == list(expected)
        held = held.scatter_add(1, entries.rows, entries.asks.long())
        fed = entries.fed
    assert bool((held == columns).all())
