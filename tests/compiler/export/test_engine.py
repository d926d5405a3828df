"""Engines do what the compiled model does, step by step, and refuse what they can't."""

from __future__ import annotations

import copy
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accel
import pytest
import torch
from accel import AccelError, Engine, EngineError, ExportError
from accel.compiler.export import FORMATS
from accel.compiler.export.onnx_file import OnnxFile, OnnxRunner
from accel.examples.export.bench import count_ifs
from accel.tests.models import dit, euler, noise, relative
from torch import Tensor, nn

from .conftest import EngineFile

LABELS = torch.tensor([1, 2])
KINDS = tuple(form.suffix.removeprefix(".") for form in FORMATS)


def example() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (noise(),), {"timestep": torch.full((2,), 1000.0), "class_labels": LABELS}


def exported(folder: Path, kind: str, **options: Any) -> Engine:
    args, kwargs = example()
    return accel.export(dit(2), args, kwargs, path=folder / f"dit.{kind}", options=options or None)


@pytest.fixture(params=KINDS)
def engine(request: pytest.FixtureRequest, engine_file: EngineFile) -> Engine:
    return accel.load(engine_file(request.param))


def compiled() -> Any:
    return torch.compile(dit(2), backend="accel", options={"lowering": "eager"})


def test_a_run_agrees_with_the_compiled_model(engine: Engine) -> None:
    fast = compiled()
    with torch.no_grad():
        expected = euler(fast, noise(), LABELS)
    got = euler(engine, noise(), LABELS)
    assert max(map(relative, got, expected)) < 1e-4
    stats = engine.stats()
    assert (stats.full_steps, stats.predicted_steps) == (8, 12)
    assert stats.full_steps == accel.stats(fast).full_steps
    assert accel.stats(engine) == stats
    engine.reset()
    assert engine.stats().full_steps == engine.stats().state_bytes == 0


def test_the_first_step_is_the_plain_model(engine: Engine) -> None:
    args, kwargs = example()
    with torch.no_grad():
        plain = dit(2)(*args, **kwargs)
    result = engine(*args, **kwargs)
    assert relative(result.sample, plain.sample) < 1e-5
    assert torch.equal(result.sample, result["sample"])
    assert torch.equal(result.sample, result[0])
    (alone,) = engine(*args, **kwargs, return_dict=False)
    assert torch.equal(alone, result.sample)


def test_another_batch(engine: Engine) -> None:
    """DiT's own code fixes the resolution (it takes the root of the token count), not the batch."""
    for batch in (2, 3, 5):
        labels = torch.arange(batch)
        with torch.no_grad():
            expected = euler(compiled(), noise(batch), labels, steps=8)
        got = euler(engine, noise(batch), labels, steps=8)
        assert max(map(relative, got, expected)) < 1e-4
    with pytest.raises(EngineError, match=r"hidden_states has to be float32 \[s\d+, 2, 8, 8\]"):
        euler(engine, noise(size=12), LABELS)
    with pytest.raises(EngineError, match=r"other.* sizes \(s\d+ = 1\).*where s\d+ >= 2"):
        euler(engine, noise(1), LABELS[:1])


def test_runs_that_share_an_engine_do_not_mix(engine: Engine) -> None:
    def step(state: Tensor, labels: Tensor, index: int) -> Tensor:
        timestep = torch.full((2,), 1000.0 * (1 - index / 20))
        out: Tensor = engine(state, timestep=timestep, class_labels=labels, return_dict=False)[0]
        return out

    alone = {}
    for seed in (1, 2):
        alone[seed] = euler(engine, noise(seed=seed), LABELS + seed)
        engine.reset()
    states = {seed: noise(seed=seed) for seed in (1, 2)}
    for index in range(20):
        for seed, state in states.items():
            velocity = step(state, LABELS + seed, index)
            torch.testing.assert_close(velocity, alone[seed][index])
            states[seed] = state - velocity * 0.3 / 20
    assert engine.stats().runs == 2


def test_an_explicit_trajectory(engine: Engine) -> None:
    with accel.trajectory(engine, steps=20):
        euler(engine, noise(), LABELS)
    assert engine.stats().predicted_steps
    assert engine.stats().state_bytes == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda k: k.update(hidden_states=noise()[:, :1]), "hidden_states has to be float32"),
        (lambda k: k.update(hidden_states=noise().double()), "float64"),
        (lambda k: k.update(hidden_states=noise()[0]), r"float32 \[2, 8, 8\]"),
        (lambda k: k.update(timestep=torch.ones(3)), r"timestep has to be .*here \[2\]"),
        (lambda k: k.update(timestep=500.0), "timestep .*it is a float"),
        (lambda k: k.pop("class_labels"), "class_labels has to be int64 .*it is missing"),
        (lambda k: k.update(cross_attention_kwargs={"scale": 2}), "was None when the engine"),
        (lambda k: k.update(nonsense=None), "no argument 'nonsense'"),
        (
            lambda k: k.update(nonsense=1),
            "DiTTransformer2DModel has no argument 'nonsense'; it has hidden_states, ",
        ),
    ],
)
def test_wrong_inputs_are_named_and_harmless(
    engine: Engine, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    reference = euler(engine, noise(), LABELS)
    engine.reset()
    (sample,), kwargs = example()
    good = {"hidden_states": sample, **kwargs}
    bad = copy.copy(good)
    change(bad)
    with pytest.raises(EngineError, match=message):
        engine(**bad)
    with pytest.raises(EngineError, match="positional"):
        engine(*range(20))
    with pytest.raises(EngineError, match="twice"):
        engine(sample, hidden_states=sample)
    assert engine.stats().full_steps == 0
    for one, other in zip(euler(engine, noise(), LABELS), reference, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_always_compute_and_a_pass_that_is_off(kind: str, tmp_path: Path) -> None:
    with torch.no_grad():
        plain = euler(dit(2), noise(), LABELS, steps=6)
    computing = exported(tmp_path, kind, pade={"schedule": "full"})
    assert max(map(relative, euler(computing, noise(), LABELS, steps=6), plain)) < 1e-5
    assert computing.stats().full_steps == 6
    if kind == "pt2":
        return  # packages without state: those of recommenders
    stateless = exported(tmp_path, kind, pade=False)
    assert max(map(relative, euler(stateless, noise(), LABELS, steps=6), plain)) < 1e-5
    assert stateless.graph is None
    assert stateless.stats().full_steps == 0
    by_name = {record.name: record for record in stateless.manifest.passes}
    assert "turned off" in by_name["pade"].skipped[0]


def test_a_model_without_a_skip_branch_says_so(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU()).eval()
    engine = accel.export(model, (torch.randn(3, 4),), path=tmp_path / "plain.onnx")
    inputs = torch.randn(5, 4)
    torch.testing.assert_close(engine(inputs), model(inputs).detach())
    pade = next(record for record in engine.manifest.passes if record.name == "pade")
    assert not pade.matched
    assert "no repeated blocks" in pade.skipped[0]


def test_a_model_whose_sample_is_not_an_input(tmp_path: Path) -> None:
    """An engine could not tell its runs apart."""

    class HoldsItsSample(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dit = dit(2)
            self.register_buffer("sample", noise())

        def forward(self, timestep: Tensor) -> Any:
            return self.dit(self.sample, timestep=timestep, class_labels=LABELS)

    args = (torch.full((2,), 1000.0),)
    path = tmp_path / "a.onnx"
    model = HoldsItsSample()
    with pytest.raises(ExportError, match="none of the inputs is recognised as the noisy sample"):
        accel.export(model, args, path=path)
    assert list(tmp_path.iterdir()) == []
    engine = accel.export(model, args, path=path, options={"pade": False})
    later = torch.full((2,), 300.0)
    with torch.no_grad():
        assert relative(engine(later).sample, model(later).sample) < 1e-5


def test_what_cannot_be_exported_leaves_no_file(tmp_path: Path) -> None:
    class Breaks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return x * 2

    with pytest.raises(ExportError, match="can't be captured as one graph"):
        accel.export(Breaks(), (torch.ones(2),), path=tmp_path / "a.onnx")
    with pytest.raises(ExportError, match="does not take these example inputs"):
        accel.export(dit(), (), {"nonsense": 1}, path=tmp_path / "a.onnx")
    with pytest.raises(ExportError, match=r"has to end in \.onnx, .* or \.\w+, not"):
        accel.export(dit(), *example(), path=tmp_path / "a.engine")
    for options, message in (
        ({"lowering": "eager"}, "lowering 'eager' is for torch.compile"),
        ({"pade": {"max_error": float("inf")}}, "infinite or NaN"),
    ):
        with pytest.raises(AccelError, match=message):
            accel.export(dit(2), *example(), path=tmp_path / "a.onnx", options=options)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_would_not_load_is_not_left(
    engine_file: EngineFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the engine that was there before stays."""
    before = engine_file("onnx").read_bytes()
    (tmp_path / "dit.onnx").write_bytes(before)

    def refuse(form: OnnxFile, path: Path) -> None:
        raise EngineError("not today")

    monkeypatch.setattr(OnnxFile, "read", refuse)
    with pytest.raises(ExportError, match="does not load: not today"):
        exported(tmp_path, "onnx")
    assert [each.name for each in tmp_path.iterdir()] == ["dit.onnx"]
    assert (tmp_path / "dit.onnx").read_bytes() == before


def test_an_engine_that_computes_something_else_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The translators have faults of their own: the zoo met some (Chroma in ONNX, for one)."""
    sound = OnnxRunner.__call__

    def off(runner: Any, *tensors: Tensor) -> list[Tensor]:
        return [result * 1.01 if result.is_floating_point() else result
                for result in sound(runner, *tensors)]  # fmt: skip

    monkeypatch.setattr(OnnxRunner, "__call__", off)
    with pytest.raises(ExportError, match=r"something else than the model .* error 9\.9e-03"):
        exported(tmp_path, "onnx")
    assert list(tmp_path.iterdir()) == []


def test_one_branch_and_weights_once(engine_file: EngineFile) -> None:
    import onnx

    assert count_ifs(engine_file("onnx")) == 1
    model = onnx.load(engine_file("onnx"))
    stored = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    owned = sum(tensor.nbytes for tensor in dit(2).state_dict().values())
    assert owned * 0.9 < stored < owned * 1.1
    branches = [a.g for node in model.graph.node if node.op_type == "If" for a in node.attribute]
    assert len(branches) == 2
    assert all(len(tensor.raw_data) < 1000 for g in branches for tensor in g.initializer)


def test_no_sources_in_a_package(engine_file: EngineFile) -> None:
    names = zipfile.ZipFile(engine_file("pt2")).namelist()
    assert any(name.endswith(".so") for name in names)
    assert not any(name.endswith(".cpp") for name in names)


def test_fixed_sizes(tmp_path: Path) -> None:
    args, kwargs = example()
    engine = accel.export(dit(2), args, kwargs, path=tmp_path / "a.onnx", free_sizes=False)
    assert engine.manifest.symbols == {}
    engine(*args, **kwargs)
    kwargs = {name: value[:1] for name, value in kwargs.items()}
    with pytest.raises(EngineError, match=r"has to be float32 \[2, 2, 8, 8\]"):
        engine(args[0][:1], **kwargs)


def test_an_engine_in_reports(engine: Engine) -> None:
    with pytest.raises(AccelError, match=r"engine\.manifest\.passes"):
        accel.report_of(engine)


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_attention(kind: str, tmp_path: Path) -> None:
    """Through accel's operators, or in ONNX through standard ones; in both branches of a step.

    torch.onnx (2.13) can't name the operands of such branches where sizes are free.
    """
    sparse = {"omnisparse": {"recall": 0.3, "window": 0, "minimum": 400}}
    kwargs = {"timestep": torch.full((2,), 1000.0), "class_labels": LABELS}
    sample, times = noise(size=48), [1.0, 0.95, 0.9, 0.85, 0.8]
    path = tmp_path / f"dit.{kind}"
    free = kind != "onnx"
    engine = accel.export(dit(2), (sample,), kwargs, path=path, options=sparse, free_sizes=free)
    (record,) = (each for each in engine.manifest.passes if each.name == "omnisparse")
    assert len(record.matched) == 2
    fast = torch.compile(dit(2), backend="accel", options={**sparse, "lowering": "eager"})
    with torch.no_grad():
        expected = euler(fast, sample, LABELS, times=times)
        plain = euler(dit(2), sample, LABELS, times=times)
    got = euler(engine, sample, LABELS, times=times)
    assert max(map(relative, got, expected)) < 1e-3
    assert relative(got[0], plain[0]) > 1e-5
    assert engine.stats().predicted_steps
