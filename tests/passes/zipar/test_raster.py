"""The order of decoding: counts from the paper and its code, and what always holds."""

import pytest
from accel.kernels.errors import OptionError
from accel.passes.zipar.raster import NOTHING, Raster
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(("window", "passes"), [(16, 400), (14, 356), (12, 312), (8, 224)])
def test_released_schedule_for_llamagen(window: int, passes: int) -> None:
    raster = Raster(24, 24, window)
    assert len(raster.passes) == raster.count == passes


@pytest.mark.parametrize(
    ("window", "passes"), [(11, 518), (14, 659), (16, 753), (17, 800), (20, 941)]
)
def test_released_schedule_for_lumina(window: int, passes: int) -> None:
    """Its code counts the row's start as one of the window's tokens."""
    raster = Raster(48, 48, window - 1, end_of_line=True)
    assert len(raster.passes) == raster.count == passes


def test_reported_counts() -> None:
    emu3 = Raster(90, 90, 7, end_of_line=True)
    assert len(emu3.passes) == emu3.count == 713
    assert emu3.tokens == 8190
    assert Raster(32, 32, 3).adaptive_bound == 184


@given(
    st.integers(1, 6), st.integers(1, 7), st.integers(1, 7), st.booleans(),
    st.sampled_from(["latest", "completed"]), st.booleans(),
)  # fmt: skip
def test_every_token_once_and_after_what_it_needs(
    rows: int, columns: int, window: int, lines: bool, start: str, alone: bool
) -> None:
    raster = Raster(rows, columns, min(window, columns), lines, start, alone)
    assert len(raster.passes) == raster.count
    ends = {raster.index(row, columns) for row in range(rows)} if lines else set()
    known = {-1} | ends
    targets: list[int] = []
    written: set[int] = set()
    for entries in raster.passes:
        asked = [entry.target for entry in entries if entry.target != NOTHING]
        assert [entry.target for entry in entries[: len(asked)]] == asked  # they come first
        assert len({entry.slot for entry in entries}) == len(entries)
        for entry in entries:
            assert entry.source in known
            assert entry.target in (NOTHING, entry.slot + 1)
            assert entry.source <= entry.slot
            row, column = divmod(entry.target, raster.stride)
            if entry.target != NOTHING and row and column == 0:
                whole = row == 1 and (alone or not lines)
                needed = range(columns if whole else raster.window)
                above = {raster.index(row - 1, each) for each in needed}
                assert above <= known
        written |= {entry.slot for entry in entries if entry.slot == entry.source}
        targets += asked
        known |= set(asked)
    assert sorted(targets) == sorted(set(range(raster.tokens)) - ends)
    # Each token has entered in its own place but for the last, and the last row's end.
    missing = set(range(-1, raster.tokens)) - written
    assert missing == {raster.index(rows - 1, columns - 1)} | ({raster.tokens - 1} & ends)


def test_a_window_of_all_columns_is_sequential() -> None:
    raster = Raster(3, 4, 4)
    assert [[entry.target for entry in each] for each in raster.passes] == [[n] for n in range(12)]


def test_tables_are_padded() -> None:
    raster = Raster(3, 4, 2, end_of_line=True)
    tables = raster.tables(multiple=8)
    assert len(tables.slots) % 8 == 0
    for number, entries in enumerate(raster.passes):
        slots = [*(entry.slot for entry in entries)]
        assert tables.slots[number].tolist() == slots + [NOTHING] * (raster.width - len(slots))
    assert bool((tables.targets[len(raster.passes) :] == NOTHING).all())


@pytest.mark.parametrize(
    "values", [(0, 4, 1), (4, 0, 1), (4, 4, 0), (4, 4, 5), (4, 4, 2, False, "none")]
)
def test_refusals(values: tuple[int, ...]) -> None:
    with pytest.raises(OptionError):
        Raster(*values)
