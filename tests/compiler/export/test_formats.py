"""The table of formats: what is made from it names all of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import accel
import pytest
import torch
from accel import EngineError, ExportError, OptionError
from accel.compiler import cli, export
from accel.compiler.export.formats import Format
from accel.compiler.export.manifest import Manifest
from torch import nn

SUFFIXES = [form.suffix for form in export.FORMATS]


class Loud:
    """Runs the module that was exported, twice as loud if asked."""

    def __init__(self, module: Any, factor: int) -> None:
        self.module, self.factor = module, factor
        self.providers = ["memory"]

    def __call__(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        return [each * self.factor for each in self.module(*tensors)]


@dataclass(frozen=True)
class InMemory(Format):
    """The smallest format: the file holds the manifest, the program stays here."""

    suffix: ClassVar[str] = ".memory"
    summary: ClassVar[str] = "kept in memory"
    programs: ClassVar[dict[str, Any]] = {}

    factor: int = 1

    def write(self, program: Any, manifest: Manifest, path: Path) -> None:
        self.programs[path.name] = program.module()
        path.write_text(manifest.write())

    def read(self, path: Path) -> tuple[Manifest, Loud]:
        return Manifest.read(path.read_text()), Loud(self.programs[path.name], self.factor)


def test_a_format_is_complete() -> None:
    assert len(set(SUFFIXES)) == len(SUFFIXES)
    for form in export.FORMATS:
        assert form.suffix.startswith(".")
        assert form.summary
        assert form.files(form(), Path(f"a{form.suffix}"))[0] == Path(f"a{form.suffix}")
        assert all(form.cannot.values())


def test_a_wrong_name_is_told_all_suffixes(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    for name, seen in (("a.engine", r"\.engine"), ("a", "nothing")):
        pattern = ".*".join(rf"\{suffix}" for suffix in SUFFIXES) + f", not '{seen}'"
        with pytest.raises(EngineError, match=pattern):
            accel.load(tmp_path / name)
        with pytest.raises(ExportError, match=pattern):
            accel.export(model, (torch.ones(1, 2),), path=tmp_path / name)


def test_options_of_another_format_are_refused() -> None:
    with pytest.raises(OptionError, match=r"'providers' is an option of \.onnx; those of .*: none"):
        accel.load("a.pt2", providers=["CPUExecutionProvider"])
    with pytest.raises(OptionError, match=r"'nonsense' is an option of no format; .*: providers"):
        accel.load("a.onnx", nonsense=1)


def test_a_new_format_needs_its_row_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "FORMATS", (*export.FORMATS, InMemory))
    model, inputs = nn.Linear(4, 4).eval(), torch.randn(3, 4)
    path = tmp_path / "a.memory"
    engine = accel.export(model, (inputs,), path=path)
    expected = model(inputs).detach()
    torch.testing.assert_close(engine(inputs), expected)
    torch.testing.assert_close(accel.load(path, factor=2)(inputs), 2 * expected)
    with pytest.raises(OptionError, match=r"'factor' is an option of \.memory"):
        accel.load("a.onnx", factor=2)
    with pytest.raises(EngineError, match=r"or \.memory, not"):
        accel.load("a.engine")
    command = next(
        each
        for each in cli._application().registered_commands
        if each.callback.__name__ == "export"
    )
    (argument,) = (each for each in command.callback.__defaults__ if hasattr(each, "help")
                   and ".memory: kept in memory" in (each.help or ""))  # fmt: skip
    assert all(form.summary in argument.help for form in export.FORMATS)
