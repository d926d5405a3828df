"""A model repository for NVIDIA's Triton inference server: an ONNX file that decides by itself.

An engine leaves it to Python to decide whether a step is computed. A server runs the file alone,
so here the decision, the predictor's coefficients and the bookkeeping of one sampling run are part
of the graph. Its state is named inputs and outputs, which the server hands from one request of a
sequence to the next ("implicit state"), beginning with zeros. One sequence is one sampling run;
with separate guidance calls it is two.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.errors import ExportError, OptionError
from ...kernels.predictors import judged
from ...passes import PadePass
from ...passes.pade import StackState, rules
from ...passes.pade.rules import Carried, CarriedAnswer, CarriedStream
from ..extras import optional
from ..models.schedulers import check_steps, weights_of
from ..options import Options, parse_options
from .capture import Captured, capture
from .manifest import Manifest, dtype_of
from .onnx_file import OnnxFile, OnnxRunner, convert
from .program import manifest_of, to_program
from .trial import try_out

__all__ = ["export_repository"]

# As the server names element types (inference.DataType in its model_config.proto).
SERVER_TYPES = {
    torch.float32: "TYPE_FP32", torch.float64: "TYPE_FP64", torch.float16: "TYPE_FP16",
    torch.bfloat16: "TYPE_BF16", torch.int64: "TYPE_INT64", torch.int32: "TYPE_INT32",
    torch.int16: "TYPE_INT16", torch.int8: "TYPE_INT8", torch.uint8: "TYPE_UINT8",
    torch.bool: "TYPE_BOOL",
}  # fmt: skip
LONGEST = 1000  # steps; the table of decisions has their square


@dataclass(frozen=True)
class StateTensor:
    """A tensor that the server keeps: zeros when a sequence begins."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def zeros(self) -> Tensor:
        """As a sequence begins."""
        return torch.zeros(self.shape, dtype=self.dtype)


class SequenceStep(nn.Module):
    """One step of a sampling run, the decision included.

    forward(*inputs, *state) returns (*outputs, computed, *new state), the state as in `state`:
    how many steps there were, the newest computed one (1 more than its number), how many residuals
    are known, whether they may be predicted from, their times, each stream's tensors, and what is
    owed to each answer. Entries of the history beyond the known ones repeat the oldest.
    weights: of each step's answers in the samples that come after it; None where that is not known.
    """

    def __init__(
        self, captured: Captured, pade: PadePass, steps: int, weights: Sequence[float] | None
    ) -> None:
        super().__init__()
        stack: StackState = captured.program.state
        self.step = captured.step
        self.stack = stack
        self.inputs = len(captured.paths)
        self.outputs = len(captured.outputs)
        # Where the timesteps are among the inputs.
        placeholders = list(captured.program.module.graph.find_nodes(op="placeholder"))
        self.times = tuple(captured.nodes.index(placeholders[i]) for i in stack.clock.times)
        self.batch = int(stack.batch)
        self.steps = steps
        self.max_error = pade.max_error
        forecast = pade.forecast(stack.predictor)
        self.predictors = forecast.predictors
        forecast.schedule.check(steps)
        # Rows: the step; columns: the newest computed step.
        table = [
            [forecast.schedule.computes(i, j, steps) for j in range(steps)] for i in range(steps)
        ]
        self.table = nn.Buffer(torch.tensor(table))
        self.answers: dict[int, Tensor] = {}
        if weights is None or not pade.correction:
            return
        correction = forecast.correction
        shares = [rules.share_given_back(correction, steps - step) for step in range(steps)]
        self.weights = nn.Buffer(torch.tensor(weights, dtype=torch.float64))
        self.shares = nn.Buffer(torch.tensor(shares, dtype=torch.float64))
        self.answers = {
            place: captured.expected[place] for place in stack.clock.answers
            if len(captured.expected[place]) == self.batch
        }  # fmt: skip

    def state(self) -> list[StateTensor]:
        """What the server keeps of a run."""
        predictor = self.stack.predictor
        counters = [(name, (1,), torch.int64) for name in ("step", "last", "known")]
        found: list[tuple[str, tuple[int, ...], torch.dtype]] = [
            *counters,
            ("trusted", (1,), torch.bool),
            ("times", (predictor.history, self.batch), torch.float64),
        ]
        for index, stream in enumerate(self.stack.streams):
            shape = tuple(map(int, stream.shape))
            names = [f"residual_{age}" for age in range(predictor.history)]
            names += ["stack_input"] * predictor.reads_inputs
            found.append((f"moments_{index}", tuple(map(int, stream.moments)), torch.float32))
            found += [(f"{name}_{index}", shape, stream.dtype) for name in names]
        for index, answer in enumerate(self.answers.values()):
            shape = tuple(answer.shape)
            found.append((f"answer_{index}", shape, answer.dtype))
            found.append((f"predicted_{index}", shape, torch.float32))
            for name in ("answer_time", "weight", "moment"):
                found.append((f"{name}_{index}", (self.batch,), torch.float64))
        return [StateTensor(f"accel_{name}", shape, dtype) for name, shape, dtype in found]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """See the class. The rules are `passes.pade.rules`, on tensors."""
        inputs, carried = tensors[: self.inputs], self._carried(tensors[self.inputs :])
        compute = rules.decide(carried, self._planned(carried))
        assert isinstance(compute, Tensor)
        compute = compute[0]
        now = rules.sample_times([inputs[index] for index in self.times], self.batch)
        step: Any = carried.step
        remaining = (1 - step[0].double() / self.steps).clamp(min=0)
        streams = rules.arguments(self.predictors, carried, now, remaining)
        results = self.step(*inputs, *self.stack.pack(compute, streams))

        made = self.stack.unpack(results[self.outputs :])
        finite, _, error = judged([each.moments for each in made])
        outputs, owed = self._given_back(results[: self.outputs], carried, compute, now)
        carried = rules.record(carried, self.stack.predictor, compute, finite, now, made)
        carried = replace(carried, answers=owed)
        sound = rules.trusted(carried.known, finite, error, self.max_error)
        trusted = rules.choose(compute, sound, carried.trusted)
        state = self._flat(replace(carried, trusted=trusted))
        return (*outputs, compute[None], *state)

    def _given_back(
        self, results: Sequence[Tensor], carried: Carried, compute: Tensor, now: Tensor
    ) -> tuple[list[Tensor], tuple[CarriedAnswer, ...]]:
        """The outputs, with what is given back, and what is owed after the step."""
        outputs, owed = list(results), []
        step: Any = carried.step
        place = step[0].clamp(max=self.steps - 1)
        for index, before in zip(self.answers, carried.answers, strict=True):
            answer, weight = outputs[index], self.weights[place].expand(self.batch)
            share = self.shares[place].expand(self.batch)
            corrected = rules.given_back(before, answer, now, weight, share)
            outputs[index] = rules.choose(compute, corrected, answer)
            after = rules.nothing_owed(answer, now), rules.owed_more(before, answer, now, weight)
            pairs = zip(*(vars(each).values() for each in after), strict=True)
            owed.append(CarriedAnswer(*[rules.choose(compute, *each) for each in pairs]))
        return outputs, tuple(owed)

    def _carried(self, flat: Sequence[Tensor]) -> Carried:
        step, last, known, trusted, times, *rest = flat
        history, reads = self.stack.predictor.history, self.stack.predictor.reads_inputs
        streams = []
        for _ in self.stack.streams:
            moments, *residuals = [rest.pop(0) for _ in range(1 + history)]
            previous = rest.pop(0) if reads else None
            streams.append(CarriedStream(moments, tuple(residuals), previous))
        answers = tuple(CarriedAnswer(*[rest.pop(0) for _ in range(5)]) for _ in self.answers)
        return Carried(step, last, known, trusted, times.unbind(0), tuple(streams), answers)

    def _flat(self, carried: Carried) -> list[Any]:
        """In the order of `state`."""
        flat = [carried.step, carried.last, carried.known, carried.trusted]
        flat.append(torch.stack(carried.times))
        for stream in carried.streams:
            flat += [stream.moments, *stream.residuals]
            flat += [] if stream.previous is None else [stream.previous]
        for owed in carried.answers:
            flat += vars(owed).values()
        return flat

    def _planned(self, carried: Carried) -> Tensor:
        """Whether the schedule computes the step; beyond the planned ones, always."""
        step: Any = carried.step
        last: Any = carried.last
        top = self.steps - 1
        planned: Tensor = self.table[step.clamp(max=top), (last - 1).clamp(min=0, max=top)]
        return planned | (step >= self.steps)


def export_repository(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    path: str | os.PathLike[str],
    steps: int,
    scheduler: Any = None,
    options: Options | Mapping[str, Any] | None = None,
    name: str = "",
    sequences: int = 8,
) -> Path:
    """Write `<path>/<name>/config.pbtxt` and `<path>/<name>/1/model.onnx`; returns `<path>/<name>`.

    args, kwargs: example inputs; all their sizes are fixed. steps: how many steps a sampling run
    has; a request beyond them is computed. scheduler: one of diffusers', set to a run's timesteps:
    says what it makes of outputs, so that the file gives back what predicted steps missed; None, or
    one of higher order: nothing is given back. sequences: how many runs one instance of the model
    serves at a time. name: of the model on the server, by default its class.
    Raises ExportError where the Padé pass does not apply or the directory is there already, and
    OptionError for options that a server can't carry out; then nothing is written.
    """
    parsed = parse_options(options)
    pade = parsed.of(PadePass)
    if pade is None or pade.stability_gate is not None or parsed.lowering != Options().lowering:
        raise OptionError(
            "a server needs the Padé pass, without a gate and with the default lowering; export "
            "a model without it with accel.export"
        )
    if not (isinstance(steps, int) and 1 <= steps <= LONGEST):
        raise OptionError(f"steps is {steps!r}; it has to be a whole number from 1 to {LONGEST}")
    if not (isinstance(sequences, int) and sequences >= 1):
        raise OptionError(f"sequences is {sequences!r}; it has to be a whole number from 1")
    if scheduler is not None:
        check_steps(scheduler, steps)
    name = name or type(model).__name__
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise OptionError(f"name {name!r} can't be a directory's: letters, digits, '_', '-', '.'")
    target = Path(path) / name
    if target.exists():
        raise ExportError(f"{target} is there already; name another directory or remove it")
    captured = capture(model, args, kwargs or {}, parsed, OnnxFile.cannot, free=False)
    device = captured.examples[0].device
    if device.type != "cpu":
        raise ExportError(
            f"the model is on {device}; move it to the CPU to write it, the server chooses what "
            "runs the file"
        )
    if captured.program.state is None:
        declined = next(result for result in captured.results if result.name == "pade")
        raise ExportError(
            f"there is no state to serve, as the Padé pass does not apply: {declined.skipped[-1]}"
        )
    weights = None if scheduler is None else weights_of(scheduler)
    sequence = SequenceStep(captured, pade, steps, weights).eval()
    state = sequence.state()
    with torch.no_grad():
        examples = (*captured.examples[: sequence.inputs], *(each.zeros() for each in state))
        program = to_program(sequence, examples)
    manifest = manifest_of(model, captured, None, parsed, OnnxFile().versions())
    names = [each.name for each in state]
    inputs = [*(spec.name for spec in manifest.inputs), *names]
    outputs = [*(spec.name for spec in manifest.outputs), "accel_computed"]
    outputs += [f"{each}_out" for each in names]

    Path(path).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path, prefix=".accel-") as folder:
        written = Path(folder) / name
        (written / "1").mkdir(parents=True)
        about = dataclasses.replace(manifest, state=None)
        file = written / "1" / "model.onnx"
        convert(program, inputs, outputs, about, file)
        try_out(
            lambda: _first_step(file, sequence, examples), captured.expected, captured.selective
        )
        (written / "config.pbtxt").write_text(_configuration(name, manifest, state, sequences))
        os.replace(written, target)
    return target


def _first_step(file: Path, sequence: SequenceStep, examples: Sequence[Tensor]) -> Sequence[Tensor]:
    """What the file makes of the example inputs as a sequence begins: the model's own results."""
    session = optional("onnxruntime", "onnx").InferenceSession(str(file))
    return OnnxRunner(session)(*examples)[: sequence.outputs]


def _configuration(
    name: str, manifest: Manifest, state: Sequence[StateTensor], sequences: int
) -> str:
    """The server's configuration, as a protobuf message `inference.ModelConfig` in text."""

    def tensor(name: str, dtype: torch.dtype, shape: Sequence[Any]) -> str:
        return f'  {{ name: "{name}" {_form(dtype, shape)} }}'

    specs = [
        [tensor(spec.name, dtype_of(spec.dtype), spec.shape) for spec in group]
        for group in (manifest.inputs, manifest.outputs)
    ]
    specs[1].append(tensor("accel_computed", torch.bool, (1,)))
    kept = []
    for each in state:
        form = _form(each.dtype, each.shape)
        kept.append(
            f'    {{ input_name: "{each.name}" output_name: "{each.name}_out" {form}\n'
            f'      initial_state {{ name: "zeros" zero_data: true {form} }} }}'
        )
    size = sum(math.prod(each.shape) * each.dtype.itemsize for each in state)
    return "\n".join(
        [
            f"# Written by accel. One sequence is one sampling run; it keeps {size} bytes.",
            f'name: "{name}"',
            'backend: "onnxruntime"',
            "# The batch is part of every shape: what is batched are the samples of one run.",
            "max_batch_size: 0",
            "input [",
            ",\n".join(specs[0]),
            "]",
            "output [",
            ",\n".join(specs[1]),
            "]",
            "sequence_batching {",
            f"  oldest {{ max_candidate_sequences: {sequences} }}",
            "  state [",
            ",\n".join(kept),
            "  ]",
            "}",
            "",
        ]
    )


def _form(dtype: torch.dtype, shape: Sequence[Any]) -> str:
    # The server has no tensors of rank 0.
    sizes = ", ".join(map(str, shape or (1,)))
    return f"data_type: {SERVER_TYPES[dtype]} dims: [ {sizes} ]"
