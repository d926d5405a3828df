"""Portable programs: what torch alone reads, whole, free in its sizes, and without a pickle."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accel
import pytest
import torch
from accel import EngineError
from accel.compiler.export.torch_archive import seal_archive
from accel.tests.models import dit, euler, noise, relative
from torch import Tensor, nn

from .conftest import EngineFile

LABELS = torch.tensor([1, 2])
EXAMPLE = {"timestep": torch.full((2,), 1000.0), "class_labels": LABELS}


@pytest.fixture
def path(engine_file: EngineFile) -> Path:
    return engine_file("ep")


def test_torch_alone_reads_it(path: Path) -> None:
    """With its branch, and without accel's operators."""
    with path.open("rb") as file:
        program = torch.export.load(file)
    parts = [
        part for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)
    ]
    targets = [str(node.target) for part in parts for node in part.graph.nodes]
    assert targets.count("cond") == 1
    assert not any(target.startswith("accel") for target in targets)
    manifest = accel.load(path).manifest
    inputs = [torch.zeros([2 if isinstance(size, str) else size for size in spec.shape],
                          dtype=getattr(torch, spec.dtype))
              for spec in manifest.graph_inputs]  # fmt: skip
    inputs[:3] = [noise(), EXAMPLE["timestep"], LABELS]
    names = [spec.name for spec in manifest.graph_inputs]
    assert names[:3] == ["hidden_states", "timestep", "class_labels"]
    inputs[3] = torch.tensor(True)
    with torch.no_grad():
        plain = dit(2)(noise(), **EXAMPLE).sample
        assert relative(program.module()(*inputs)[0], plain) < 1e-5


def test_a_run_with_other_sizes(path: Path) -> None:
    engine = accel.load(path)
    fast = torch.compile(dit(2), backend="accel", options={"lowering": "eager"})
    for batch in (2, 3):
        labels = torch.arange(batch)
        with torch.no_grad():
            expected = euler(fast, noise(batch), labels, steps=8)
        with accel.trajectory(engine, steps=8):
            got = euler(engine, noise(batch), labels, steps=8)
        assert max(map(relative, got, expected)) < 1e-5
    assert engine.stats().predicted_steps == accel.stats(fast).predicted_steps > 0
    with pytest.raises(EngineError, match=r"hidden_states has to be float32 \[s\d+, 2, 8, 8\]"):
        euler(engine, noise(size=12), LABELS)


def test_shared_subgraphs_are_declined_with_the_reason(path: Path) -> None:
    (outline,) = (each for each in accel.load(path).manifest.passes if each.name == "outline")
    assert not outline.matched
    assert "torch.export.save writes a shared subgraph out at every call" in outline.skipped[0]


def test_nothing_of_the_machine_that_wrote_it(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        text = archive.read("archive/models/model.json").decode()
    assert Path(torch.__file__).parent.parent.as_posix() not in text
    assert "stack_trace" not in text


class Odd(nn.Module):
    """An infinite number, a tensor made on the way, weights that share memory, and an empty one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, dtype=torch.bfloat16)
        self.second = nn.Linear(4, 4, dtype=torch.bfloat16)
        self.second.weight = self.first.weight
        self.register_buffer("nothing", torch.empty(0, 4, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x)) * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=x.dtype)
        x = x.masked_fill(x > 1.0, float("-inf")).softmax(-1)
        return torch.cat([x, self.nothing])


def test_values_that_are_hard_to_write(tmp_path: Path) -> None:
    model, inputs = Odd().eval(), torch.randn(3, 4, dtype=torch.bfloat16)
    engine = accel.export(model, (inputs,), path=tmp_path / "odd.ep")
    for given in (inputs, torch.randn(5, 4, dtype=torch.bfloat16)):
        with torch.no_grad():
            torch.testing.assert_close(engine(given), model(given), rtol=0, atol=0, equal_nan=True)


Records = dict[str, bytes]


def rewritten(source: Path, target: Path, change: Callable[[Records], None]) -> None:
    """Another archive, correctly sealed."""
    with zipfile.ZipFile(source) as old:
        records = {name: old.read(name) for name in old.namelist()}
    change(records)
    with zipfile.ZipFile(target, "w") as new:
        for name, content in records.items():
            new.writestr(name, content)
    seal_archive(target)


class Touches:
    """Whose unpickling leaves a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


def in_samples(records: Records, harm: Touches) -> None:
    buffer = io.BytesIO()
    torch.save(((harm,), {}), buffer)
    records["archive/data/sample_inputs/model.pt"] = buffer.getvalue()


def in_weights(records: Records, harm: Touches) -> None:
    name = "archive/data/weights/model_weights_config.json"
    config = json.loads(records[name])
    first = next(iter(config["config"].values()))
    first["use_pickle"] = True
    buffer = io.BytesIO()
    torch.save(harm, buffer)
    records[f"archive/data/weights/{first['path_name']}"] = buffer.getvalue()
    records[name] = json.dumps(config).encode()


def in_constants(records: Records, harm: Touches) -> None:
    meta = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True}
    config = {"config": {"harm": {**meta, "tensor_meta": None}}}
    records["archive/data/constants/model_constants_config.json"] = json.dumps(config).encode()
    records["archive/data/constants/opaque_obj_0"] = pickle.dumps(harm)


@pytest.mark.parametrize("hide", [in_samples, in_weights, in_constants])
def test_a_pickle_is_refused_unread(path: Path, hide: Any, tmp_path: Path) -> None:
    touched, target = tmp_path / "touched", tmp_path / "forged.ep"
    rewritten(path, target, lambda records: None)
    accel.load(target)  # the forger's tools work
    rewritten(path, target, lambda records: hide(records, Touches(touched)))
    with pytest.raises(EngineError, match=r"holds data/.*: torch could unpickle or run it"):
        accel.load(target)
    assert not touched.exists()
    with target.open("rb") as file, contextlib.suppress(Exception):
        torch.export.load(file)
    assert touched.exists()  # so there was something to refuse


def test_machine_code_is_refused(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "forged.ep"
    rewritten(path, target, lambda r: r.update({"archive/data/aotinductor/model/a.so": b"code"}))
    with pytest.raises(EngineError, match=r"holds data/aotinductor/model/a\.so, which no engine"):
        accel.load(target)


def changed(name: str, key: str, value: Any) -> Callable[[Records], None]:
    def change(records: Records) -> None:
        data = json.loads(records[f"archive/{name}"])
        data[key] = value
        records[f"archive/{name}"] = json.dumps(data).encode()

    return change


def twice(name: str, key: str) -> Callable[[Records], None]:
    def change(records: Records) -> None:
        data = json.loads(records[f"archive/{name}"])
        data[key] *= 2
        records[f"archive/{name}"] = json.dumps(data).encode()

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("models/model.json", "schema_version", {"major": 99, "minor": 0}),
         r"torch .* can't load it \(written by torch .*version"),
        (changed("models/model.json", "graph_module", {}), "can't load it"),
        (lambda records: records.pop("archive/models/model.json"), "can't load it"),
        (lambda records: records.pop("archive/data/weights/weight_0"), "can't load it"),
        (changed("extra/accel_manifest.json", "outputs", []), "samples without outputs of their"),
        (twice("extra/accel_manifest.json", "outputs"), r"outputs, not those of its mani"),
        (changed("extra/accel_manifest.json", "machine", {"device": "cuda"}), "CUDA device"),
    ],
)  # fmt: skip
def test_a_program_that_does_not_fit(
    path: Path, change: Callable[[Records], None], message: str, tmp_path: Path
) -> None:
    if message == "CUDA device" and torch.cuda.is_available():
        pytest.skip("an engine made for a CUDA device is refused only where there is none")
    target = tmp_path / "other.ep"
    rewritten(path, target, change)
    with pytest.raises(EngineError, match=message):
        accel.load(target)
