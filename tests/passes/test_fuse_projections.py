"""Linear layers of one value as one: which are, what stays the same, and what forbids it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import accel
import pytest
import torch
from accel.compiler.export.capture import capture
from accel.compiler.options import parse_options
from accel.kernels.errors import OptionError
from accel.passes import Constants, FuseProjectionsPass, PassResult, Program, Slot
from accel.passes.graph.nodes import call_name
from accel.passes.graph.verify import verify
from torch import Tensor, nn
from torch.nn.functional import linear

from ..language_models import llama
from ..models import dit, euler, noise, program_of, relative

ON: dict[str, Any] = {"fuse_projections": True, "lowering": "eager", "verify": True}
LABELS = torch.tensor([1, 2])


def compiled(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="accel", fullgraph=True, options=ON | options)


def run(program: Program, **options: Any) -> tuple[Program, PassResult]:
    """The pass alone, verified."""
    made, result = FuseProjectionsPass(**options).run(program)
    assert (made is program) == (not result.matched)
    if result.matched:
        verify(program, made, "fuse_projections", deep=True)
    return made, result


def calls(program: Program) -> Counter[str]:
    return Counter(
        call_name(node) for node in program.module.graph.nodes if node.op.startswith("call")
    )


class Projected(nn.Module):
    """A few layers of one value, of different widths; biased: which of them have a bias."""

    def __init__(self, sizes: tuple[int, ...] = (8, 4, 6), biased: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(8, size, bias=index in biased) for index, size in enumerate(sizes)
        )

    def forward(self, value: Tensor) -> Any:
        return [layer(value) for layer in self.layers]


# What it does to a graph


@torch.no_grad()
def test_operators_before_and_after() -> None:
    before = program_of(llama(), torch.arange(7)[None], use_cache=False)
    after, result = run(before)
    old, new = calls(before), calls(after)
    assert old - new == {"linear": 6}
    assert new - old == {"_split": 4, "getitem": 10}
    assert len(result.matched) == 4
    assert result.details["linear layers"] == "4 instead of 10"
    (added,) = after.added
    assert isinstance(added, Constants)
    # Queries, keys and values of 32, 16 and 16, gate and up of 64, in each of two layers.
    assert [each.shape for each in added.inputs] == [(64, 32), (128, 32)] * 2
    assert result.details["weight bytes"] == 2 * (64 + 128) * 32 * 4
    again, result = run(after)
    assert again is after
    assert "no value is read by 2 linear layers" in str(result.skipped[0])


@torch.no_grad()
def test_off_unless_asked_for() -> None:
    found = accel.explain(Projected(), torch.randn(2, 8)).passes["fuse_projections"]
    assert not found.matched
    assert "turned off" in str(found.skipped[0])


@torch.no_grad()
def test_what_all_blocks_read_is_fused_in_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of a prompt: all of them at once would make blocks unlike each other."""

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
            scores = x @ self.key(prompt).mT
            return x + self.out(scores.softmax(-1) @ self.value(prompt))

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Cross() for _ in range(28))

        def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x, prompt)
            return x

    model, given = Stack(), (torch.randn(2, 5, 8), torch.randn(2, 3, 8))
    monkeypatch.setattr("accel.passes.outline.FEWEST", 1)
    fast = compiled(model)
    torch.testing.assert_close(fast(*given), model(*given))
    found = accel.report_of(fast).passes
    assert len(found["fuse_projections"].matched) == 28
    assert found["outline"].details[0] == {"calls": 28, "subgraphs": 1}


# What stays the same


class Named(Projected):
    def forward(self, value: Tensor) -> Any:
        return [linear(input=value, weight=each.weight, bias=each.bias) for each in self.layers]


class Shared(Projected):
    def forward(self, value: Tensor) -> Any:
        return [linear(value, each.weight) for each in [*self.layers, self.layers[0]]]


class Turned(Projected):
    """Of a weight that lies in memory the other way round."""

    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            layer.weight.data = layer.weight.data.t().contiguous().t()


class InPlace(Projected):
    """A result that is written to, and one that depends on where in memory it is."""

    def forward(self, value: Tensor) -> Any:
        first, second, third = super().forward(value)
        first.mul_(2)
        return first.view(-1), second, third.add_(1).view(-1)


class Scattered(Projected):
    """Layers between which other things happen, that do not touch what they read."""

    def forward(self, value: Tensor) -> Any:
        first = self.layers[0](value)
        noted = value.clone().add_(1)
        second = self.layers[1](value)
        first.relu_()
        return first, noted, second, self.layers[2](value)


class WrittenAfter(Projected):
    def forward(self, value: Tensor) -> Any:
        value = value.clone()
        results = super().forward(value)
        return results, value.view(-1).add_(1)


FORMS: dict[str, Callable[[], nn.Module]] = {
    "no bias": Projected,
    "all with a bias": lambda: Projected(biased=(0, 1, 2)),
    "one with a bias": lambda: Projected(biased=(1,)),
    "by name": lambda: Named(biased=(0,)),
    "one layer twice": Shared,
    "turned": Turned,
    "in place": InPlace,
    "scattered": Scattered,
    "written after": WrittenAfter,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8)])
@torch.no_grad()
def test_values(form: str, shape: tuple[int, ...]) -> None:
    model, value = FORMS[form](), torch.randn(shape)
    fast = compiled(model)
    got, expected = fast(value), model(value)
    torch.testing.assert_close(got, expected)
    assert len(accel.report_of(fast).passes["fuse_projections"].matched) == 1


@torch.no_grad()
def test_results_have_memory_of_their_own() -> None:
    model, value = Projected(), torch.randn(1, 1, 8)
    got, expected = compiled(model)(value), model(value)
    assert [each.stride() for each in got] == [each.stride() for each in expected]
    assert len({each.untyped_storage().data_ptr() for each in got}) == 3


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_other_types(kind: torch.dtype) -> None:
    model, value = Projected(biased=(0,)).to(kind), torch.randn(5, 8, dtype=kind)
    torch.testing.assert_close(compiled(model)(value), model(value))


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
@torch.no_grad()
def test_sizes_that_change(lowering: str) -> None:
    model = llama()
    fast = compiled(model, lowering=lowering)
    for length in (7, 9, 12):
        ids = torch.arange(length)[None]
        expected = model(ids, use_cache=False).logits
        assert relative(fast(ids, use_cache=False).logits, expected) < 1e-5
    assert accel.stats(fast).recompiles == 1
    assert len(accel.report_of(fast).passes["fuse_projections"].matched) == 8


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
@torch.no_grad()
def test_inside_a_branch_and_a_shared_subgraph(lowering: str) -> None:
    plain = torch.compile(dit(), backend="accel", options={"lowering": lowering})
    expected = euler(plain, noise(), LABELS)
    assert accel.stats(plain).predicted_steps == 12
    fast = compiled(dit(), lowering=lowering)
    got = euler(fast, noise(), LABELS)
    assert max(map(relative, got, expected)) < 1e-4
    assert accel.stats(fast).predicted_steps == 12
    found = accel.report_of(fast).passes
    assert len(found["fuse_projections"].matched) == 2
    assert found["pade"].matched == ("transformer_blocks (2)",)
    assert found["outline"].details[0] == {"calls": 2, "subgraphs": 1}


@pytest.mark.parametrize("kind", ["onnx", "ep"])
@torch.no_grad()
def test_export(kind: str, tmp_path: Path) -> None:
    """The fused weights are in the file, in the place of those that they were made of."""
    model, path = dit(2), tmp_path / f"dit.{kind}"
    named = {"timestep": torch.full((2,), 1000.0), "class_labels": LABELS}
    options = {"fuse_projections": True}
    engine = accel.export(model, (noise(),), named, path=path, options=options)
    (found,) = (each for each in engine.manifest.passes if each.name == "fuse_projections")
    assert len(found.matched) == 2
    weight: Any = model.transformer_blocks[0].attn1.to_k.weight
    lines = (weight[3].numpy().tobytes(), weight[:, 3].numpy().tobytes())  # ONNX may turn it
    assert sum(map(path.read_bytes().count, lines)) == 1
    expected = euler(compiled(model, fuse_projections=False), noise(), LABELS)
    assert max(map(relative, euler(engine, noise(), LABELS), expected)) < 1e-4
    assert engine.stats().predicted_steps == 12


@torch.no_grad()
def test_capture_beside_sparse_attention() -> None:
    """Whose results at the example come from a graph without a branch, but with fused weights."""
    model, sample = dit(2), noise(size=48)
    named = {"timestep": torch.full((2,), 1000.0), "class_labels": LABELS}
    sparse = {"omnisparse": {"recall": 0.3, "window": 0, "minimum": 400}}
    options = parse_options({"fuse_projections": True, **sparse})
    captured = capture(model, (sample,), named, options, {}, free=False)
    matched = {each.name for each in captured.results if each.matched}
    assert matched == {"fuse_projections", "omnisparse", "pade", "outline"}
    alone = compiled(model, fuse_projections=False, pade=False, **sparse)
    expected = alone(sample, **named, return_dict=False)
    torch.testing.assert_close(captured.expected, expected)


# Weights that change


def in_place(model: Projected) -> None:
    model.layers[1].weight.mul_(2)


def by_copying(model: Projected) -> None:
    weight: Any = model.layers[2].weight
    weight.data.copy_(torch.randn_like(weight))


def loaded(model: Projected) -> None:
    model.load_state_dict(Projected(biased=(0,)).state_dict())


def replaced(model: Projected) -> None:
    model.layers[0].bias = nn.Parameter(torch.ones(8))


CHANGES = {"in place": in_place, "data.copy_": by_copying, "loaded": loaded, "replaced": replaced}


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
@torch.no_grad()
def test_a_changed_weight_is_noticed(lowering: str) -> None:
    model, value = Projected(biased=(0,)), torch.randn(3, 8)
    fast = compiled(model, lowering=lowering)
    before = fast(value)
    for change in CHANGES.values():
        change(model)
        got, expected = fast(value), model(value)
        assert any(not torch.equal(*pair) for pair in zip(expected, before, strict=True))
        torch.testing.assert_close(got, expected)
        before = got


@torch.no_grad()
def test_refresh() -> None:
    """One number of many, past torch's count: not seen at once, but after `refresh`."""
    model, value = Projected((2000, 8)), torch.ones(8)
    fast = compiled(model)
    before = fast(value)
    weight: Any = model.layers[0].weight
    weight.data[1001, 3] += 1
    torch.testing.assert_close(fast(value), before)
    accel.refresh(fast)
    torch.testing.assert_close(fast(value), model(value))


# What forbids it


class InputWritten(Projected):
    def forward(self, value: Tensor) -> Any:
        value = value + 1
        first = self.layers[0](value)
        value.view(-1)[0] = 5  # through a view
        return first, self.layers[1](value)


class WeightWritten(Projected):
    def forward(self, value: Tensor) -> Any:
        first = self.layers[0](value)
        self.layers[1].weight.view(-1).add_(1)
        return first, self.layers[1](value)


class StateBetween(Projected):
    def forward(self, value: Tensor) -> Any:
        first = self.layers[0](value)
        with torch.autocast("cpu", enabled=False):
            return first, self.layers[1](value)


class Autocast(Projected):
    def forward(self, value: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(value)


class Computed(Projected):
    def forward(self, value: Tensor) -> Any:
        return [linear(value, layer.weight * 2) for layer in self.layers]


class Mean(Projected):
    """Weights of one row, without a dimension for it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(8)) for _ in range(2))

    def forward(self, value: Tensor) -> Any:
        return linear(value, self.first), linear(value, self.second)


class OneBias(Projected):
    """A number that is added to all results."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1))

    def forward(self, value: Tensor) -> Any:
        return [linear(value, layer.weight, self.bias) for layer in self.layers]


class Different(Projected):
    def forward(self, value: Tensor) -> Any:
        return [layer(value + index) for index, layer in enumerate(self.layers)]


class OneOfTwo(Projected):
    def forward(self, value: Tensor) -> Any:
        return self.layers[0](value), linear(value, self.layers[1].weight * 2)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "input written": (InputWritten, "setitem is between layers of one value: it may write"),
    "weight written": (WeightWritten, "side effects.*may write to l_self_modules_layers"),
    "state between": (StateBetween, "side effects.*_enter_autocast is between layers"),
    "autocast": (Autocast, r"autocast is on: it mixes torch\.bfloat16, torch\.float32"),
    "computed": (Computed, "no projections of one value.*is no weight of the model"),
    "no rows": (Mean, r"its weight is of \[8\]; needed are two known sizes"),
    "one bias": (OneBias, r"its bias is of \[1\], not \[8\]"),
    "different values": (Different, "no value is read by 2 linear layers of one block"),
    "one of two": (OneOfTwo, "1 of 2 layers of one value can be fused"),
}


@pytest.mark.parametrize("form", REFUSED)
@torch.no_grad()
def test_refused(form: str) -> None:
    make, reason = REFUSED[form]
    model, value = make(), torch.randn(3, 8)
    fast = compiled(model)
    state = {name: each.clone() for name, each in model.state_dict().items()}
    got = fast(value)
    model.load_state_dict(state)
    torch.testing.assert_close(got, model(value))
    found = accel.report_of(fast).passes["fuse_projections"]
    assert not found.matched
    said = "; ".join(map(str, found.skipped))
    assert re.search(reason, said), said


@torch.no_grad()
def test_autocast_around_the_call() -> None:
    model, value = Projected(), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        fast = compiled(model)
        torch.testing.assert_close(fast(value), model(value))
    found = accel.report_of(fast).passes["fuse_projections"]
    assert not found.matched
    assert "autocast is on" in str(found.skipped[0])


@torch.no_grad()
def test_weights_that_the_caller_gives() -> None:
    class Given(nn.Module):
        def forward(self, value: Tensor, first: Tensor, second: Tensor) -> Any:
            return linear(value, first), linear(value, second)

    _, result = run(program_of(Given(), *torch.randn(3, 8, 8)))
    assert "is no weight of the model" in str(result.skipped[0])


@torch.no_grad()
def test_weights_that_another_pass_has_added() -> None:
    """Constants are functions of the caller's first inputs alone."""
    program = program_of(Projected(), torch.randn(3, 8))
    weights = program.module.graph.find_nodes(op="placeholder")[-2:]
    slots = tuple(Slot(each.name, (1,), torch.float32, torch.device("cpu")) for each in weights)
    added = (Constants(nn.Identity(), (), slots),)
    _, result = run(replace(program, added=added))
    assert not result.matched
    assert {each.detail for each in result.skipped[:2]} == {
        f"{each.name} is no weight of the model" for each in weights
    }


def test_training() -> None:
    model, value = Projected(), torch.randn(3, 8)
    fast = compiled(model)
    sum(each.sum() for each in fast(value)).backward()
    assert model.layers[0].weight.grad is not None
    found = accel.report_of(fast).passes["fuse_projections"]
    assert "training graph" in str(found.skipped[0])
    with torch.no_grad():
        torch.testing.assert_close(fast(value), model(value))
    assert accel.report_of(fast).passes["fuse_projections"].matched


# Options


@torch.no_grad()
def test_options() -> None:
    program = program_of(Projected(biased=(0,)), torch.randn(3, 8))
    size = 18 * 9 * 4
    assert run(program, weight_bytes=size)[1].details["weight bytes"] == size
    _, result = run(program, weight_bytes=size - 1)
    assert str(result.skipped[0]) == (
        f"a table too large: the fused weights take {size} bytes, more than {size - 1}"
    )
    assert run(program, minimum=3)[1].matched
    assert "by 4 linear layers" in str(run(program, minimum=4)[1].skipped[0])
    for options, said in (({"minimum": 1}, "two layers or more"), ({"weight_bytes": 0}, "above 0")):
        with pytest.raises(OptionError, match=said):
            FuseProjectionsPass(**options)
