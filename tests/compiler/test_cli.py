"""The command line of a checkout; tests/test_wheel.py has that of an installed wheel."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from accel import Profile
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
        ((), ["explain", "calibrate", "export", "run", "tensorrt", "demo", "bench"]),
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
    (tmp_path / "theirs.py").write_text("import nowhere_to_be_found")
    monkeypatch.syspath_prepend(tmp_path)
    entry = EntryPoint("theirs", "theirs:command", "accel.commands")
    monkeypatch.setattr(cli, "entry_points", lambda group: [entry])
    with pytest.raises(ModuleNotFoundError, match="nowhere_to_be_found"):
        cli._application()


MINE = """
import accel, torch
from accel.tests.models import dit, noise

def build():
    model = torch.compile(dit(), backend="accel", options={"lowering": "eager"})

    @torch.no_grad()
    def run(seed):
        state = noise(seed=seed)
        with accel.trajectory(model, steps=8):
            for step in range(8):
                told = {"timestep": torch.full((2,), 1000 - 125.0 * step)}
                state = state - 0.1 * model(state, class_labels=torch.tensor([1, 2]), **told).sample
        return state

    return model, run

def wrong():
    return 1, 2, 3
"""


def test_calibrate_writes_a_profile_and_a_curve(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    sys.path.insert(0, str(tmp_path))  # `said` hands it on
    try:
        profile, curve = tmp_path / "p.json", tmp_path / "curve.png"
        text = said("calibrate", "mine:build", "-o", str(profile), "--plot", str(curve))
        found = Profile.read(profile)
        for point in found.points:
            assert f"{len(point.computed)} of 8" in text
            assert f"{point.psnr:.1f}" in text
        assert curve.read_bytes().startswith(b"\x89PNG")
        with pytest.raises(subprocess.CalledProcessError) as caught:
            said("calibrate", "mine:wrong")
        assert "has to return (model, run), not tuple" in caught.value.stderr
    finally:
        sys.path.remove(str(tmp_path))
