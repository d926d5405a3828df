"""The command line of a checkout; tests/test_wheel.py has that of an installed wheel."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from accel.compiler import cli

PROGRAM = "from accel.compiler.cli import main; main()"


def said(*arguments: str) -> str:
    environment = {"PATH": "/usr/bin:/bin", "COLUMNS": "200", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments],
                          capture_output=True, text=True, check=True, env=environment)  # fmt: skip
    return done.stdout


@pytest.mark.parametrize(
    ("arguments", "listed"),
    [
        ((), ["explain", "export", "run", "tensorrt", "demo", "bench"]),
        (("demo",), ["--output", "--pictures", "--seed"]),
        (("bench",), ["pade", "omnisparse", "zipar", "export"]),
        (("bench", "zipar"), ["--parts", "--repeats"]),
    ],
)
def test_help_lists_the_commands_of_the_compiler_and_of_the_examples(
    arguments: tuple[str, ...], listed: list[str]
) -> None:
    text = said(*arguments, "--help")
    assert all(each in text for each in listed)


def test_what_else_an_entry_point_lacks_is_said_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text("import nowhere_to_be_found")
    monkeypatch.syspath_prepend(tmp_path)
    entry = EntryPoint("mine", "mine:command", "accel.commands")
    monkeypatch.setattr(cli, "entry_points", lambda group: [entry])
    with pytest.raises(ModuleNotFoundError, match="nowhere_to_be_found"):
        cli._application()
