"""Damaged, foreign and forged files: a named error, never a crash, never a run."""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accel
import pytest
import torch
from accel import EngineError
from accel.compiler.export import FORMATS, onnx_file
from accel.compiler.export.manifest import Manifest
from accel.compiler.export.seal import seal
from accel.compiler.export.torch_archive import MANIFEST, seal_archive
from accel.tests.models import dit, noise

from .conftest import EngineFile

KINDS = tuple(form.suffix.removeprefix(".") for form in FORMATS)
MUTATIONS = 100  # of each format


def refused(path: Path, match: str) -> None:
    with pytest.raises(EngineError, match=match):
        accel.load(path)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(engine_file: EngineFile, kind: str, tmp_path: Path) -> None:
    content = engine_file(kind).read_bytes()
    pick = random.Random(0)
    target = tmp_path / f"damaged.{kind}"
    for number in range(MUTATIONS):
        damaged = bytearray(content)
        if number % 4 == 0:
            del damaged[pick.randrange(len(damaged)) :]
        elif number % 4 == 1:
            damaged[pick.randrange(len(damaged))] ^= 1 << pick.randrange(8)
        elif number % 4 == 2:
            place = pick.randrange(len(damaged) - 64)
            damaged[place : place + 64] = pick.randbytes(64)
        else:
            damaged += pick.randbytes(pick.randrange(1, 200))
        target.write_bytes(damaged)
        refused(target, "its seal is missing|does not match its seal")


def test_foreign_files(tmp_path: Path) -> None:
    for kind in KINDS:
        path = tmp_path / f"foreign.{kind}"
        refused(path, "no such file")
        for content in (b"", b"hello", bytes(100_000)):
            path.write_bytes(content)
            refused(path, "not an engine of accel")
    torch.onnx.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),), tmp_path / "plain.onnx",
                      dynamo=True, verbose=False)  # fmt: skip
    refused(tmp_path / "plain.onnx", "not an engine of accel")
    # Sealed by somebody, but no engine.
    sealed = tmp_path / "sealed.onnx"
    sealed.write_bytes(b"hello")
    seal(sealed, onnx_file.SEAL)
    refused(sealed, "can't load it")
    for kind in ("pt2", "ep"):
        sealed = tmp_path / f"sealed.{kind}"
        sealed.write_bytes(b"hello")
        seal_archive(sealed)
        refused(sealed, "not an archive of torch")
        program = torch.export.export(torch.nn.ReLU(), (torch.ones(1),))
        with sealed.open("wb") as file:
            torch.export.save(program, file)
        seal_archive(sealed)
        refused(sealed, "without a manifest")
    seal(tmp_path / "plain.onnx", onnx_file.SEAL)
    refused(tmp_path / "plain.onnx", "without a manifest")


def reseal_onnx(source: Path, target: Path, text: str) -> None:
    import onnx

    model = onnx.load(source)
    entries = [entry for entry in model.metadata_props if entry.key != "accel.sha256"]
    del model.metadata_props[:]
    model.metadata_props.extend(entries)
    for entry in model.metadata_props:
        if entry.key == onnx_file.MANIFEST:
            entry.value = text
    onnx.save(model, target)
    seal(target, onnx_file.SEAL)


def reseal_archive(source: Path, target: Path, text: str) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            changed = text.encode() if info.filename.endswith(MANIFEST) else None
            new.writestr(info, old.read(info) if changed is None else changed)
    seal_archive(target)


RESEAL = {"onnx": reseal_onnx, "pt2": reseal_archive, "ep": reseal_archive}


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(data: dict[str, Any]) -> None:
        *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
        place: Any = data
        for part in parents:
            place = place[part]
        if value is KeyError:
            del place[last]
        else:
            place[last] = value

    return apply


# Each with the error that it deserves.
FORGERIES = {
    "format": (change("format", 99), "has format 99; this version reads 1"),
    "missing": (change("inputs", KeyError), "should have the entries .*'inputs'"),
    "extra": (change("surprise", 1), "it has .*'surprise'"),
    "kind": (change("inputs", "three"), "inputs is 'three', which is not"),
    "dtype": (change("inputs/0/dtype", "load"), "the dtype 'load', which torch does not have"),
    "size": (change("state/streams/0/shape", ["__import__('os')", 1, 1]), "no expression of sizes"),
    "position": (change("state/times", [77]), "refers to input 77"),
    "no time": (change("state/times", []), "no stream, no timestep or no sample"),
    "options": (change("options", {"pade": {"predictor": "nonsense"}}), "unknown predictor"),
    "contradiction": (change("options", {"pade": False}), "its options turn the Padé pass off"),
    "symbol": (change("symbols", {"s0": [0, 99]}), "says that s0 is at"),
    "name": (change("inputs/0/name", "another"), "inputs are .* not those of its manifest"),
    "state": (change("state/inputs", []), "not those of its manifest|has 0 inputs"),
    "device": (change("machine/device", "nonsense"), "names no known device"),
    "nan": (change("defaults", {"x": float("nan")}), "NaN is not a number of JSON"),
}


@pytest.mark.parametrize(
    ("kind", "forgery"),
    # Only an ONNX graph knows its inputs' names.
    [(kind, name) for kind in RESEAL for name in FORGERIES if kind == "onnx" or name != "name"],
)
def test_wrong_manifests(engine_file: EngineFile, kind: str, forgery: str, tmp_path: Path) -> None:
    """Correctly sealed, with a manifest that is not right."""
    text = accel.load(engine_file(kind)).manifest.write()
    data = json.loads(text)
    apply, message = FORGERIES[forgery]
    apply(data)
    target = tmp_path / f"forged.{kind}"
    reseal = RESEAL[kind]
    reseal(engine_file(kind), target, text)
    assert accel.load(target).manifest.write() == text  # the forger's tools work
    target.unlink()
    reseal(engine_file(kind), target, json.dumps(data))
    refused(target, message)


def test_another_machine(engine_file: EngineFile, tmp_path: Path) -> None:
    text = accel.load(engine_file("pt2")).manifest.write()
    data = json.loads(text)
    data["machine"]["capability"] = "sm_90"
    reseal_archive(engine_file("pt2"), tmp_path / "other.pt2", json.dumps(data))
    refused(tmp_path / "other.pt2", r"built for another machine: capability sm_90 \(here")


def test_a_manifest_survives(engine_file: EngineFile) -> None:
    manifest = accel.load(engine_file("onnx")).manifest
    assert Manifest.read(manifest.write()) == manifest


def test_weights_in_a_file_of_their_own(
    engine_file: EngineFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What happens above 2 GiB, made to happen at once."""
    monkeypatch.setattr(onnx_file, "LARGEST", 1000)
    kwargs = {"timestep": torch.full((2,), 1000.0), "class_labels": torch.tensor([1, 2])}
    path = tmp_path / "large.onnx"
    engine = accel.export(dit(2), (noise(),), kwargs, path=path)
    weights = tmp_path / "large.onnx.data"
    assert sorted(each.name for each in tmp_path.iterdir()) == [path.name, weights.name]
    inline_size = engine_file("onnx").stat().st_size
    assert path.stat().st_size < inline_size - 0.9 * weights.stat().st_size
    inline = accel.load(engine_file("onnx"))
    torch.testing.assert_close(engine(noise(), **kwargs)[0], inline(noise(), **kwargs)[0])
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.write_bytes(content)
    refused(path, "does not match its seal")
    weights.unlink()
    refused(path, "does not match its seal")
