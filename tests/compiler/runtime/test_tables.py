"""Tables follow the weights, in whatever way these change."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import accel
import pytest
import torch
from accel.compiler.runtime import tables
from accel.kernels.errors import AccelError
from torch import Tensor, nn

from ...passes.codebook.test_rewrite import table_graph
from ..models.solid.test_serving import HISTORY, recommender

ITEMS = 2000
OPTIONS: dict[str, Any] = {"codebook": True, "lowering": "eager", "verify": True}
IDS = torch.tensor([[0, 4, 2], [1, 1999, 3]])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(ITEMS, 16)
        self.head = nn.Linear(16, 16)

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.head(self.item(ids))
        return result


def compiled(model: nn.Module) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="accel", fullgraph=True, options=OPTIONS)


def step(make: Callable[..., torch.optim.Optimizer], **settings: Any) -> Callable[[Net], None]:
    """Of an optimizer, which changes one row of a table that has many."""

    def change(model: Net) -> None:
        for each in model.parameters():
            each.grad = torch.zeros_like(each)
        assert model.item.weight.grad is not None
        model.item.weight.grad[4] = 1
        make(model.parameters(), lr=0.1, **settings).step()

    return change


def of_a_flat_buffer(model: Net) -> None:
    """An optimizer of a tensor that the weights are views of, as in sharded training."""
    weights = model.item.weight
    flat = nn.Parameter(weights.data.view(-1))
    flat.grad = torch.zeros_like(flat)
    flat.grad[64:80] = 1
    torch.optim.SGD([flat], lr=0.1, fused=True).step()


def compiled_step(model: Net) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    for each in model.parameters():
        each.grad = torch.zeros_like(each)
    assert model.item.weight.grad is not None
    model.item.weight.grad[4] = 1
    torch.compile(optimizer.step, backend="eager")()


def by_numpy(model: Net) -> None:
    model.head.bias.detach().numpy()[:] += 1


def assigned(model: Net) -> None:
    state = {name: each + 1 for name, each in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def one_row_loaded(model: Net) -> None:
    state = copy.deepcopy(model.state_dict())
    state["item.weight"][4] += 1
    model.load_state_dict(state)


def one_row_elsewhere(model: Net) -> None:
    weights = model.item.weight.detach().clone()
    weights[4] += 1
    model.item.weight.data = weights


AT_ONCE: dict[str, Callable[[Net], None]] = {
    "fused SGD": step(torch.optim.SGD, fused=True),
    "fused Adam": step(torch.optim.Adam, fused=True),
    "fused Adagrad": step(torch.optim.Adagrad, fused=True),
    "SGD": step(torch.optim.SGD),
    "a flat buffer": of_a_flat_buffer,
    "a compiled step": compiled_step,
    "averaging": lambda model: model.item.weight.data.lerp_(torch.ones(()), 0.01),
    "merging": lambda model: model.head.weight.data.add_(0.3),
    "numpy": by_numpy,
    "assigned": assigned,
    "one row loaded": one_row_loaded,
    "one row elsewhere": one_row_elsewhere,
}


@pytest.mark.parametrize("way", AT_ONCE)
def test_noticed_at_the_next_call(way: str) -> None:
    model = Net()
    run = compiled(model)
    with torch.no_grad():
        before = run(IDS)
    AT_ONCE[way](model)
    with torch.no_grad():
        found, expected = run(IDS), model(IDS)
    assert not torch.equal(expected, before)
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_one_row_through_data() -> None:
    """Noticed after eight calls for each 32 KiB of the weights at the latest, or by `refresh`."""
    model = Net()
    run = compiled(model)
    run(IDS)
    model.item.weight.data[4] += 1
    calls = 8 * sum(-(-each.numel() // 8192) for each in model.parameters())
    for _ in range(calls):
        run(IDS)
    torch.testing.assert_close(run(IDS), model(IDS))
    assert table_graph(model).times == 2

    model.item.weight.data[4] += 1
    accel.refresh(run)
    torch.testing.assert_close(run(IDS), model(IDS))
    assert table_graph(model).times == 3


@torch.no_grad()
def test_computed_once_while_nothing_changes() -> None:
    model, other = Net(), Net()
    run = compiled(model)
    for _ in range(200):
        run(IDS)
    step(torch.optim.SGD, fused=True)(other)
    run(IDS)
    assert table_graph(model).times == 1


@torch.no_grad()
def test_refresh_is_for_one_model() -> None:
    """Dynamo runs both by one graph."""
    first, second = Net(), Net()
    runs = compiled(first), torch.compile(second, backend="accel", fullgraph=True, options=OPTIONS)
    for run in runs:
        run(IDS)
    accel.refresh(runs[0])
    for run in runs:
        run(IDS)
    assert sum(graph.times for graph in {table_graph(first), table_graph(second)}) == 3


@torch.no_grad()
def test_refresh_of_a_recommender() -> None:
    made = recommender("SASRec")
    run = compiled(made)
    run(HISTORY)
    for name, row in (("compiled", 3), ("the module", 4), ("its model", 5)):
        made.model.model.table.weight.data[row] *= -2
        accel.refresh({"compiled": run, "the module": made, "its model": made.model}[name])
        torch.testing.assert_close(run(HISTORY)[0], made(HISTORY)[0])


def test_refresh_of_something_else() -> None:
    with pytest.raises(AccelError, match=r"compiled torch\.nn\.Module, got int"):
        accel.refresh(3)
    with pytest.raises(AccelError, match="no parameters"):
        accel.refresh(nn.ReLU())
    accel.refresh(Net())  # never compiled: there is nothing to drop


@torch.no_grad()
def test_tables_go_with_their_model() -> None:
    model = Net()
    run = compiled(model)
    run(IDS)
    graph = table_graph(model)
    (kept,) = graph.computed.values()
    table = weakref.ref(kept.tables[0])
    del kept, run, model
    gc.collect()
    torch._dynamo.reset()
    gc.collect()
    assert not graph.computed
    assert table() is None


@torch.no_grad()
def test_old_tables_go_before_new_ones_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    run = compiled(model)
    run(IDS)
    graph = table_graph(model)
    (kept,) = graph.computed.values()
    table = weakref.ref(kept.tables[0])
    del kept
    computed = tables.Constants.computed

    def seen(self: Any, inputs: Any) -> Any:
        assert table() is None
        return computed(self, inputs)

    monkeypatch.setattr(tables.Constants, "computed", seen)
    model.item.weight.mul_(2)
    torch.testing.assert_close(run(IDS), model(IDS))


@torch.inference_mode()
def test_weights_made_in_inference_mode() -> None:
    """Torch counts no changes of these; the tables are kept all the same."""
    model = Net()
    run = compiled(model)
    for _ in range(3):
        torch.testing.assert_close(run(IDS), model(IDS))
    assert table_graph(model).times == 1
    model.head.weight.mul_(2)
    torch.testing.assert_close(run(IDS), model(IDS))
