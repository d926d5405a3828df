"""`accel export` and `accel run`, as a user types them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import accel
import numpy
import pytest
import torch
from accel import EngineError
from accel.compiler.cli import main
from accel.compiler.export import sampling
from accel.tests.models import dit, noise

from .conftest import EngineFile

BUILDER = """
import torch
from accel.tests.models import dit, noise

def build():
    return dit(2), (noise(),), {"timestep": torch.ones(2), "class_labels": torch.tensor([1, 2])}
"""


def accel_command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = "from accel.compiler.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=folder, capture_output=True, text=True, timeout=300,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "200", "HOME": str(folder)},
    )  # fmt: skip


def test_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(BUILDER)
    done = accel_command(tmp_path, "export", "mine:build", "dit.onnx")
    assert done.returncode == 0, done.stderr
    assert "pade: transformer_blocks (2)" in done.stdout
    assert "not applied" in done.stdout  # outlining, and why
    numpy.savez(tmp_path / "start.npz", hidden_states=noise(3).numpy(),
                class_labels=numpy.arange(3))  # fmt: skip
    done = accel_command(tmp_path, "run", "dit.onnx", "start.npz", "--output", "end.npz",
                         "--scheduler", "FlowMatchEulerDiscreteScheduler")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "full_steps=8" in done.stdout
    with numpy.load(tmp_path / "end.npz") as results:
        assert results["hidden_states"].shape == (3, 2, 8, 8)
    done = accel_command(tmp_path, "run", "dit.onnx", "start.npz")
    assert done.returncode != 0
    assert "the input 'timestep' is missing" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mine:build", "--serve", "models", "--steps", "4"], ""),
        (["mine:build"], "an engine's PATH, or --serve DIRECTORY"),
        (["mine:nothing", "a.onnx"], "'mine:nothing' can't be found"),
    ],
)
def test_the_command_line_once_more(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, which has imported everything."""
    (tmp_path / "mine.py").write_text(BUILDER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["accel", "export", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert bool(ended.value.code) == bool(said)
    assert said in str(ended.value.code)
    assert said or (tmp_path / "models" / "DiTTransformer2DModel" / "config.pbtxt").is_file()


def test_results_without_names(tmp_path: Path) -> None:
    """A model that returns a tuple, and takes a list."""

    class Sums(torch.nn.Module):
        def forward(self, parts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            return parts[0] + parts[1], parts[0] * 2

    parts = [torch.randn(3), torch.randn(3)]
    engine = accel.export(Sums(), (parts,), path=tmp_path / "sums.onnx")
    outputs = sampling.run_once(engine, {"parts_0": parts[0], "parts_1": parts[1]})
    assert list(outputs) == ["0", "1"]
    torch.testing.assert_close(outputs["0"], parts[0] + parts[1])
    torch.testing.assert_close(engine(parts)[1], parts[0] * 2)


def test_stored_inputs(engine_file: EngineFile, tmp_path: Path) -> None:
    kwargs = {"timestep": torch.ones(2), "class_labels": torch.tensor([1, 2])}
    engine = accel.load(engine_file("onnx"))
    path = tmp_path / "in.npz"
    numpy.savez(path, hidden_states=noise().numpy(), **{k: v.numpy() for k, v in kwargs.items()})
    outputs = sampling.run_once(engine, sampling.read_inputs(engine, path))
    assert torch.equal(outputs["sample"], engine(noise(), **kwargs).sample)
    sampling.write_outputs(tmp_path / "out.npz", outputs)
    with numpy.load(tmp_path / "out.npz") as results:
        assert numpy.array_equal(results["sample"], outputs["sample"].numpy())

    numpy.savez(path, surprise=numpy.ones(2))
    with pytest.raises(EngineError, match="has 'surprise'; the engine takes hidden_states"):
        sampling.read_inputs(engine, path)
    whole = path.read_bytes()
    for broken in (b"not an archive", b"", whole[: len(whole) // 2]):
        path.write_bytes(broken)
        with pytest.raises(EngineError, match=r"not an \.npz file"):
            sampling.read_inputs(engine, path)
    numpy.savez(path, class_labels=numpy.array([1.7, 2.0]))
    with pytest.raises(EngineError, match="class_labels is float64; the engine takes int64"):
        sampling.read_inputs(engine, path)
    with pytest.raises(EngineError, match="no scheduler 'Nonsense'"):
        sampling.run_schedule(engine, {"hidden_states": noise()}, "Nonsense", 4, 0)
    with pytest.raises(EngineError, match="starting noise 'hidden_states' is missing"):
        sampling.run_schedule(engine, {}, "DDIMScheduler", 4, 0)
    plain = accel.export(dit(2), (noise(),), kwargs, path=path.with_suffix(".onnx"),
                         options={"pade": False})  # fmt: skip
    with pytest.raises(EngineError, match="made without the Padé pass"):
        sampling.run_schedule(plain, {"hidden_states": noise()}, "DDIMScheduler", 4, 0)
