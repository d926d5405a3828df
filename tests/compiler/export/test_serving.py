"""A model repository: its configuration parses, and its file samples as the compiled model does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import accel
import numpy
import onnxruntime
import pytest
import torch
from accel import AccelError, ExportError, OptionError, Profile
from accel.compiler.export.onnx_file import OnnxRunner
from accel.compiler.export.serving import export_repository
from accel.compiler.runtime.fingerprint import digests
from accel.kernels.predictors import predictor_name
from accel.kernels.predictors.hermite import Hermite
from accel.passes.pade.forecast import RECORDED, Point
from accel.tests.models import dit, euler, noise, relative
from torch import Tensor, nn

LABELS = torch.tensor([1, 2])
EXAMPLE = {"timestep": torch.full((2,), 1000.0), "class_labels": LABELS}


class Server:
    """Keeps the state between a sequence's requests, as the configuration tells it to."""

    def __init__(self, model: Path) -> None:
        self.session = onnxruntime.InferenceSession(str(model / "1" / "model.onnx"))
        self.names = [each.name for each in self.session.get_outputs()]
        self.config = configuration(model)
        self.start()

    def start(self) -> None:
        kinds = {"TYPE_FP32": numpy.float32, "TYPE_FP64": numpy.float64,
                 "TYPE_INT64": numpy.int64, "TYPE_BOOL": numpy.bool_}  # fmt: skip
        self.computed: list[bool] = []
        self.state = {}
        for each in self.config.sequence_batching.state:
            (initial,) = each.initial_state
            assert initial.zero_data
            assert list(initial.dims) == list(each.dims)
            kind = type(self.config).DESCRIPTOR.file.enum_types_by_name["DataType"]
            name = kind.values_by_number[each.data_type].name
            self.state[each.input_name] = numpy.zeros(list(initial.dims), kinds[name])

    def __call__(self, sample: Tensor, return_dict: bool = False, **inputs: Tensor) -> Any:
        fed = {name: value.numpy() for name, value in inputs.items()}
        fed["hidden_states"] = sample.numpy()
        results = dict(zip(self.names, self.session.run(None, fed | self.state), strict=True))
        pairs = [(s.input_name, s.output_name) for s in self.config.sequence_batching.state]
        self.state = {name: results[output] for name, output in pairs}
        self.computed.append(bool(results["accel_computed"][0]))
        return (torch.from_numpy(results["sample"]),)


def configuration(model: Path) -> Any:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    return text_format.Parse((model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    return export_repository(dit(2), (noise(),), EXAMPLE, path=folder, steps=20)


def sampled(sample: Any, pade: Any = True) -> tuple[list[Tensor], Any]:
    options = {"lowering": "eager", "pade": pade}
    compiled = torch.compile(dit(2), backend="accel", options=options)
    with torch.no_grad(), accel.trajectory(compiled, steps=20):
        outputs = sample(compiled, noise(), LABELS)
    return outputs, accel.stats(compiled)


def heun(model: Any, start: Tensor, labels: Tensor) -> list[Tensor]:
    """Ten steps of two evaluations; the second is at the time of the next step's first."""

    def velocity(sample: Tensor, time: float) -> Tensor:
        times = torch.full((2,), time * 1000)
        return model(sample, timestep=times, class_labels=labels, return_dict=False)[0]

    state, outputs = start, []
    for step in range(10):
        outputs.append(velocity(state, 1 - step / 10))
        outputs.append(velocity(state - 0.03 * outputs[-1], 1 - (step + 1) / 10))
        state = state - 0.03 * (outputs[-2] + outputs[-1]) / 2
    return outputs


def test_the_configuration(repository: Path) -> None:
    config = configuration(repository)
    assert config.name == repository.name == "DiTTransformer2DModel"
    assert (config.backend, config.max_batch_size) == ("onnxruntime", 0)
    session = onnxruntime.InferenceSession(str(repository / "1" / "model.onnx"))
    state = config.sequence_batching.state
    named = {each.name: list(each.dims) for each in config.input}
    named |= {each.input_name: list(each.dims) for each in state}
    assert named == {each.name: each.shape for each in session.get_inputs()}
    named = {each.name: list(each.dims) for each in config.output}
    named |= {each.output_name: list(each.dims) for each in state}
    assert named == {each.name: each.shape for each in session.get_outputs()}
    assert config.sequence_batching.oldest.max_candidate_sequences == 8
    assert sorted(each.name for each in repository.iterdir()) == ["1", "config.pbtxt"]


def flow(steps: int = 20) -> Any:
    """A scheduler that makes of outputs what `euler` does."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler: Any = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)])
    return scheduler


@pytest.mark.parametrize("known", [False, True])
def test_sequences_sample_as_the_compiled_model(
    known: bool, repository: Path, tmp_path: Path
) -> None:
    """Where the scheduler is known the file gives back what predicted steps missed, too."""
    if known:
        written = export_repository(
            dit(2), (noise(),), EXAMPLE, path=tmp_path, steps=20, scheduler=flow()
        )
    expected, stats = sampled(euler, True if known else {"correction": 0.0})
    server = Server(written if known else repository)
    for _ in range(2):  # a second sequence starts from zeros again
        server.start()
        for one, other in zip(euler(server, noise(), LABELS), expected, strict=True):
            assert relative(one, other) < 1e-5
        assert (sum(server.computed), len(server.computed)) == (stats.full_steps, 20)
        assert server.computed[0]
    server(noise(), timestep=torch.zeros(2), class_labels=LABELS)
    assert server.computed[20]  # beyond the steps that it was made for


def test_a_profile_is_part_of_the_file(tmp_path: Path) -> None:
    """Its steps and the slopes of its recording; of another model's weights it is refused."""
    model = dit(2)
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(20, 30, generator=draw, dtype=torch.float64).cumsum(0)
    profile = Profile(
        weights=tuple(digests([*model.parameters(), *model.buffers()])),
        shapes=((16, 32),),
        times=tuple(1000 - 50.0 * step for step in range(20)),
        products=(tuple(map(tuple, (values @ values.T).tolist())),),
        share=0.1,
        points=(Point((0, 2, 3, 7, 12, 18), RECORDED, 0.0, 40.0, None),),
    )
    options = {"pade": {"profile": profile, "max_error": 1e9}}
    written = export_repository(
        model, (noise(),), EXAMPLE, path=tmp_path, steps=20, options=options
    )
    expected, stats = sampled(euler, options["pade"])
    assert (stats.calibrated_steps, stats.full_steps) == (20, 6)
    server = Server(written)
    for one, other in zip(euler(server, noise(), LABELS), expected, strict=True):
        assert relative(one, other) < 1e-4
    assert [step for step in range(20) if server.computed[step]] == [0, 2, 3, 7, 12, 18]
    with pytest.raises(ExportError, match="weights that it was made with"):
        export_repository(
            dit(2, seed=1), (noise(),), EXAMPLE, path=tmp_path / "other", steps=20, options=options
        )


@pytest.mark.parametrize("predictor", ["chebyshev", Hermite(order=3)])
def test_any_predictor_is_part_of_the_file(predictor: Any, tmp_path: Path) -> None:
    """Its coefficients too, so that an object needs no code where the file runs."""
    pade = {"predictor": predictor, "max_error": 1e9, "correction": 0.0}
    written = export_repository(
        dit(2), (noise(),), EXAMPLE, path=tmp_path, steps=20, options={"pade": pade}
    )
    expected, stats = sampled(euler, pade)
    server = Server(written)
    for one, other in zip(euler(server, noise(), LABELS), expected, strict=True):
        assert relative(one, other) < 1e-4
    assert sum(server.computed) == stats.full_steps
    manifest = json.loads(server.session.get_modelmeta().custom_metadata_map["accel.manifest"])
    assert manifest["options"]["pade"]["predictor"] == predictor_name(predictor)


def test_two_evaluations_at_one_time(repository: Path) -> None:
    expected, stats = sampled(heun)
    server = Server(repository)
    got = heun(server, noise(), LABELS)
    assert sum(server.computed) == stats.full_steps
    assert stats.predicted_steps > 0
    for one, other in zip(got, expected, strict=True):
        assert relative(one, other) < 1e-4


def test_a_broken_step_is_not_predicted_from(repository: Path) -> None:
    server = Server(repository)
    times = torch.linspace(1000, 50, 20)
    for step, time in enumerate(times):
        broken = step == 3  # a step that is computed
        sample = noise() * float("nan") if broken else noise()
        (result,) = server(sample, timestep=time.repeat(2), class_labels=LABELS)
        assert bool(torch.isfinite(result).all()) != broken
    assert server.computed[:5] == [True, True, False, True, True]
    assert not all(server.computed[5:])  # and it goes on


class Blockless(nn.Module):
    def forward(self, sample: Tensor) -> Tensor:
        return sample.sin() * 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"steps": 0}, OptionError, "whole number from 1 to 1000"),
        ({"scheduler": flow(12)}, OptionError, "has 12 timesteps, but steps is 20"),
        ({"sequences": 0}, OptionError, "sequences is 0"),
        ({"name": "../elsewhere"}, OptionError, "can't be a directory's"),
        ({"options": {"pade": False}}, OptionError, "needs the Padé pass"),
        ({"options": {"pade": {"gate": {}}}}, OptionError, "without a gate"),
        ({"options": {"pade": {"schedule": [0, 30]}}}, OptionError, "has only 20 steps"),
        ({"model": Blockless(), "kwargs": {}}, ExportError, "no state to serve"),
    ],
)
def test_what_cannot_be_served(
    change: dict[str, Any], error: type[AccelError], message: str, tmp_path: Path
) -> None:
    arguments = {"model": dit(2), "kwargs": EXAMPLE, "steps": 20, "options": None, "sequences": 8}
    arguments |= change
    model, kwargs = arguments.pop("model"), arguments.pop("kwargs")
    with pytest.raises(error, match=message):
        export_repository(model, (noise(),), kwargs, path=tmp_path / "there", **arguments)
    assert list(tmp_path.rglob("*")) == []


def test_a_file_that_computes_something_else_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = OnnxRunner.__call__
    monkeypatch.setattr(
        OnnxRunner,
        "__call__",
        lambda runner, *tensors: [each * 2 for each in sound(runner, *tensors)],
    )
    with pytest.raises(ExportError, match=r"something else than the model .* error 5\.0e-01"):
        export_repository(dit(2), (noise(),), EXAMPLE, path=tmp_path, steps=20)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_stays(repository: Path) -> None:
    with pytest.raises(ExportError, match="is there already"):
        export_repository(dit(2), (noise(),), EXAMPLE, path=repository.parent, steps=20)
