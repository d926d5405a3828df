"""What pages say of the code is what the code says of itself."""

from __future__ import annotations

import re
from pathlib import Path

from accel.passes import PASSES
from accel.passes.zipar import ZipARPass

ROOT = Path(__file__).parent.parent


def test_the_table_of_passes_is_made_from_the_passes() -> None:
    rows = [
        f"| `{each.name}` | {each.summary} | {each.applies} | {each.keeps} |"
        for each in (*PASSES, ZipARPass)
    ]
    text = (ROOT / "README.md").read_text()
    begin = text.index("| pass | what it does |")
    table = text[begin : text.index("\n\n", begin)].splitlines()
    assert table[2:] == rows


def test_pages_name_files_that_exist() -> None:
    """In the tables of the folders' pages; a row may name several."""
    for folder in ("passes", "compiler", "kernels"):
        text = (ROOT / folder / "README.md").read_text()
        for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE):
            for name in re.findall(r"`([\w./*]+)`", row):
                found = [*(ROOT / folder).rglob(name.rstrip("/")), *ROOT.glob(name)]
                assert found, f"{folder}/README.md names {name}"
