"""Tables in the place of what depends on an id alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accel import Dynamics, Engine, export, report_of, stats
from accel.compiler.backend import compiled_graphs
from accel.compiler.runtime.tables import TableGraph
from accel.examples.recommender.backbones import BACKBONES
from accel.kernels.errors import OptionError
from accel.passes import CodebookPass
from torch import Tensor, nn
from torch.nn.functional import embedding, layer_norm, softmax

from ... import models
from ...compiler.models.solid.test_dynamize import CANDIDATES, HISTORY, ITEMS, dynamic, taught

FOLDED: dict[str, Any] = {"codebook": True, "lowering": "eager", "verify": True}
IDS = torch.tensor([[0, 4, 2], [1, 1, 3]])


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="accel", fullgraph=True, options=FOLDED | options)


def table_graph(model: nn.Module) -> TableGraph:
    (graph,) = compiled_graphs(frozenset(map(id, model.parameters())))
    assert isinstance(graph.call, TableGraph)
    return graph.call


def folded(run: Any) -> tuple[str, ...]:
    matched: tuple[str, ...] = report_of(run).passes["codebook"].matched
    return matched


class Rows(nn.Module):
    """Any function of what is looked up."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 4))
        self.weight, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
        self.codes = nn.Parameter(torch.randn(3, 4))
        self.more = nn.Parameter(torch.randn(9, 4))
        self.register_buffer("cache", torch.randn(5, 4))
        self.function = function

    def forward(self, ids: Tensor) -> Any:
        return self.function(self, embedding(ids, self.table), ids)


def changed(tensor: Tensor) -> Tensor:
    tensor[..., 0] = 7.0
    return tensor


def zeroed_diagonal(tensor: Tensor) -> Tensor:
    tensor.diagonal(dim1=-2, dim2=-1).zero_()
    return tensor


def read_then_zeroed(table: Tensor, ids: Tensor) -> Tensor:
    rows = table[ids]
    ids.zero_()
    return rows


def in_bfloat16(compute: Any) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return compute()


FOLDS: dict[str, Any] = {
    "a mask is made in place": lambda m, x, ids: (
        x @ m.weight + torch.ones(1, ids.shape[1], 1).cumsum_(1).clamp_(max=2)
    ),
    "linear": lambda m, x, ids: nn.functional.linear(x, m.weight, m.bias).tanh(),
    "matmul": lambda m, x, ids: 2 * (x @ m.weight.t()) - m.bias,
    "nearest": lambda m, x, ids: ((m.codes**2).sum(1) - 2 * (x @ m.codes.t())).argmin(-1),
    "norm": lambda m, x, ids: layer_norm(x, (4,), m.bias, m.bias),
    "softmax": lambda m, x, ids: softmax(x @ m.weight, -1),
    "code": lambda m, x, ids: m.codes[(x @ m.codes.t()).argmin(-1)] @ m.weight,
    "twice": lambda m, x, ids: (x @ m.weight) * m.bias + x.sum(-1).sum(),
    "dropout that is off": lambda m, x, ids: nn.functional.dropout(x, 0.5, False) @ m.weight,
    "by index": lambda m, x, ids: m.table[ids] @ m.weight,
    "a row is used alone": lambda m, x, ids: (x @ m.weight).mean(1),
}
STAYS: dict[str, Any] = {
    "by name": lambda m, x, ids: layer_norm(
        nn.functional.linear(
            input=embedding(ids, weight=m.table, padding_idx=0), weight=m.weight, bias=m.bias
        ),
        normalized_shape=(4,),
    ),
    "nothing is computed": lambda m, x, ids: x + 1,
    "rows meet": lambda m, x, ids: x.transpose(0, 1).softmax(0),
    "ids are read": lambda m, x, ids: (x + ids[..., None]) @ m.weight,
    "random": lambda m, x, ids: nn.functional.dropout(x, 0.5) @ m.weight,
    "another's rows": lambda m, x, ids: (x + m.table[ids.flip(0)]) @ m.weight,
    "in place, by name": lambda m, x, ids: nn.functional.relu(x, inplace=True) @ m.weight,
    "in place, by position": lambda m, x, ids: nn.functional.leaky_relu(x, 0.1, True) @ m.weight,
    "rows by rows": lambda m, x, ids: nn.functional.linear(x[0], x[0]),
    "a row's own rows": lambda m, x, ids: x[0] @ x[0].t(),
    "changed before": lambda m, x, ids: x.mul_(2) @ m.weight,
    "changed in part": lambda m, x, ids: changed(x) @ m.weight,
    "its table is changed": lambda m, x, ids: changed(m.cache)[ids] @ m.weight,
    "a view of it is changed": lambda m, x, ids: zeroed_diagonal(x) @ m.weight,
    "ids are changed": lambda m, x, ids: read_then_zeroed(m.table, ids.clone()) @ m.weight,
    "a view of its table is changed": lambda m, x, ids: zeroed_diagonal(m.cache)[ids] @ m.weight,
    "other types inside": lambda m, x, ids: in_bfloat16(lambda: x @ m.weight),
    "counts that differ": lambda m, x, ids: (m.table[ids - 3] + m.more[ids - 3]) @ m.weight,
    "a mask": lambda m, x, ids: (x * (ids != 0)[..., None]) @ m.weight,
}


@pytest.mark.parametrize("name", FOLDS)
@torch.no_grad()
def test_folds(name: str) -> None:
    model = Rows(FOLDS[name])
    run = compiled(model)
    torch.testing.assert_close(run(IDS), model(IDS))
    assert folded(run)
    # It is the tables that are read.
    graph = table_graph(model)
    (kept,) = graph.computed.values()
    for table in kept.tables:
        table.zero_()
    assert not torch.equal(run(IDS), model(IDS))
    # Until a weight changes.
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter))
    torch.testing.assert_close(run(IDS), model(IDS))
    torch.testing.assert_close(run(IDS[:1]), model(IDS[:1]))
    assert graph.times == 2


@pytest.mark.parametrize("name", STAYS)
@torch.no_grad()
def test_leaves_alone(name: str) -> None:
    model = Rows(STAYS[name])
    run = compiled(model)
    torch.manual_seed(0)
    found = run(IDS)
    torch.manual_seed(0)
    torch.testing.assert_close(found, model(IDS))
    assert folded(run) == ()
    assert report_of(run).passes["codebook"].skipped


@pytest.mark.parametrize("name", ["linear", "nearest"])
@pytest.mark.parametrize("by", [3, -1])
@torch.no_grad()
def test_ids_out_of_range_are_refused_as_before(name: str, by: int) -> None:
    run = compiled(Rows(FOLDS[name]))
    run(IDS)
    with pytest.raises(IndexError):
        run(IDS + by)


@torch.no_grad()
def test_negative_ids_of_an_index_count_from_the_end() -> None:
    class Indexed(Rows):
        def forward(self, ids: Tensor) -> Tensor:
            return self.table[ids] @ self.weight

    model = Indexed(None)
    run = compiled(model)
    torch.testing.assert_close(run(IDS - 3), model(IDS - 3))
    assert folded(run)


@torch.no_grad()
def test_a_result_is_the_caller_s_own() -> None:
    """Also where it is a whole table."""
    model = Rows(lambda m, x, ids: embedding(torch.arange(5).expand(1, -1), m.table) @ m.weight)
    run = compiled(model)
    run(IDS).zero_()
    torch.testing.assert_close(run(IDS), model(IDS))


@torch.no_grad()
def test_vectors_of_another_batch_than_the_table() -> None:
    def scores(m: Any, x: Tensor, ids: Tensor) -> Tensor:
        rows = embedding(torch.arange(5).expand(2, -1), m.table) @ m.weight
        return (rows @ x[:1, 0][..., None]).sum()

    model = Rows(scores)
    run = compiled(model)
    torch.testing.assert_close(run(IDS), model(IDS))
    assert report_of(run).passes["codebook"].details[0]["products with a whole table"] == 0


@torch.no_grad()
def test_autocast_around() -> None:
    model = Rows(FOLDS["linear"])
    run = compiled(model)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(run(IDS), model(IDS))
    assert "autocast" in str(report_of(run).passes["codebook"].skipped[0])


@torch.no_grad()
def test_two_models_have_tables_of_their_own() -> None:
    """Dynamo may run both by one graph."""
    first, second = Rows(FOLDS["linear"]), Rows(FOLDS["linear"])
    for model in (first, second, first):
        torch.testing.assert_close(compiled(model)(IDS), model(IDS))


def test_training_is_left_alone() -> None:
    run = compiled(Rows(FOLDS["linear"]))
    run(IDS).sum().backward()
    assert "training" in str(report_of(run).passes["codebook"].skipped[0])


@torch.no_grad()
def test_tables_that_are_too_large() -> None:
    run = compiled(Rows(FOLDS["code"]), codebook={"table_bytes": 40})
    run(IDS)
    # The nearest codes are 5 numbers of 8 bytes; the decoded codes 3 rows of 4 numbers.
    assert len(folded(run)) == 1
    assert "48 bytes" in str(report_of(run).passes["codebook"].skipped[0])
    with pytest.raises(OptionError, match="table_bytes"):
        CodebookPass(table_bytes=0)


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_recommenders(name: str, rank: int | None) -> None:
    _, made = dynamic(name, dynamics=Dynamics(width=8, rank=rank))
    taught(made)
    run = compiled(made)
    for rows in (3, 2):
        history, candidates = HISTORY[:rows], CANDIDATES[:rows]
        torch.testing.assert_close(run(history, candidates), made(history, candidates))
    details = report_of(run).passes["codebook"].details[0]
    assert details["recurrences opened"] == (3 if name == "GRU4Rec" else 2)
    codes, decoded = f": {ITEMS + 1} rows", ": 5 rows"
    assert any(each.startswith("hypernetwork.items.codebook") and each.endswith(codes)
               for each in folded(run))  # fmt: skip
    assert any(each.startswith("hypernetwork.items.encoder") and each.endswith(decoded)
               for each in folded(run))  # fmt: skip


@torch.no_grad()
def test_work_is_counted() -> None:
    """By hand: projections of 6 looked-up rows of 4 to 3, and their products with 3 to 2."""

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.project = nn.Embedding(7, 4), nn.Linear(4, 3)
            self.last = nn.Parameter(torch.randn(2, 3, 2))

        def forward(self, ids: Tensor) -> Tensor:
            return self.project(self.table(ids)) @ self.last

    run = compiled(Counted())
    run(IDS)
    details = report_of(run).passes["codebook"].details[0]
    product = 2 * 6 * 3 * 2
    assert details["flops a call"] == f"{product} instead of {2 * 6 * 4 * 3 + product}"
    # Rows, projected rows, and the product; then rows of the table and the product.
    assert details["bytes of results a call"] == (
        f"{4 * (18 + 12)} instead of {4 * (24 + 18 + 12)}"
    )


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@torch.no_grad()
def test_exported(tmp_path: Any, suffix: str) -> None:
    _, made = dynamic("SASRec")
    taught(made)
    path = tmp_path / f"recommender{suffix}"
    engine: Engine = export(made, (HISTORY, CANDIDATES), path=path, options={"codebook": True})
    expected = made(HISTORY, CANDIDATES)
    torch.testing.assert_close(engine(HISTORY, CANDIDATES), expected, rtol=1e-5, atol=1e-5)
    assert len(engine.manifest.passes[0].matched) == 4


@torch.no_grad()
def test_exported_beside_a_tensor_of_the_same_name(tmp_path: Any) -> None:
    class Named(Rows):
        def __init__(self) -> None:
            super().__init__(FOLDS["linear"])
            self.table_0 = nn.Parameter(torch.randn(4))

        def forward(self, ids: Tensor) -> Any:
            return super().forward(ids), self.table[ids].sum() + self.table_0

    model = Named()
    path = tmp_path / "named.onnx"
    engine = export(model, (IDS,), path=path, options={"codebook": True})
    torch.testing.assert_close(engine(IDS), model(IDS), rtol=1e-5, atol=1e-5)


def test_a_static_model_is_folded_too() -> None:
    model = BACKBONES["SASRec"](ITEMS).eval()
    with torch.no_grad():
        run = compiled(model)
        torch.testing.assert_close(run(HISTORY, CANDIDATES), model(HISTORY, CANDIDATES))
    assert any(f": {ITEMS} rows" in each for each in folded(run))  # the candidates' vectors


class Labelled(nn.Module):
    """A diffusion transformer whose sample is scaled by what a label is projected to."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = Rows(FOLDS["linear"])
        self.transformer = models.dit()

    def forward(self, sample: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        scale = self.rows(label)[:, :2, None, None]  # the sample has two channels
        inputs = {"timestep": timestep, "class_labels": label, "return_dict": False}
        result: Tensor = self.transformer(sample * scale, **inputs)[0]
        return result


@pytest.mark.parametrize(
    ("schedule", "predicted"), [("full", 0), ({"interval": 3, "warmup": 2}, 5)]
)
@torch.no_grad()
def test_beside_a_skip_branch(schedule: Any, predicted: int) -> None:
    """Both passes add inputs; the tables come first."""
    model, label = Labelled().eval(), torch.tensor([1, 3])
    run, errors = compiled(model, pade={"schedule": schedule}), []
    sample = models.noise()
    for step in range(9):
        timestep = torch.full((2,), 900 - 50 * step)
        found, expected = run(sample, timestep, label), model(sample, timestep, label)
        errors.append(models.relative(found, expected))
        sample = sample - 0.02 * found
    assert len(folded(run)) == 1
    assert stats(run).predicted_steps == predicted
    assert max(errors[:2]) < 1e-5
    assert max(errors) < (0.2 if predicted else 1e-5)
