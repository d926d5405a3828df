"""Tables are computed in pieces of rows, within the memory allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accel import report_of
from accel.kernels.errors import VerificationError
from accel.passes import Constants, Slot
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import embedding, gelu, layer_norm, linear, softmax
from torch.utils._python_dispatch import TorchDispatchMode

from .test_rewrite import compiled, table_graph

ITEMS, CODES, WIDTH = 5000, 256, 32
IDS = torch.tensor([[0, 4, 2], [1, 4999, 3]])


class Peak(TorchDispatchMode):
    """The most bytes that results of operations took together while it was on."""

    def __init__(self) -> None:
        super().__init__()
        self.living: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = {
            each.untyped_storage()._cdata
            for each in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(each, Tensor)
        }
        result = function(*args, **(kwargs or {}))
        for each in torch.utils._pytree.tree_leaves(result):
            if isinstance(each, Tensor) and each.untyped_storage()._cdata not in given:
                storage = each.untyped_storage()
                self.living[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.living = {key: one for key, one in self.living.items() if not one[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.living.values()))
        return result


class Items(nn.Module):
    """Any function of what is looked up."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(ITEMS, WIDTH))
        self.codes = nn.Parameter(torch.randn(CODES, WIDTH))
        self.wide = nn.Parameter(torch.randn(8 * WIDTH, WIDTH) / WIDTH)
        self.gain = nn.Parameter(torch.randn(WIDTH))
        self.fine = nn.Parameter(torch.randn(8 * WIDTH, dtype=torch.float64))
        self.function = function

    def forward(self, ids: Tensor) -> Tensor:
        return self.function(self, embedding(ids, self.table))


def nearest(m: Any, x: Tensor) -> Tensor:
    return ((m.codes**2).sum(1) - 2 * (x @ m.codes.t())).argmin(-1)


FUNCTIONS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "nearest": nearest,
    "decoded": lambda m, x: linear(m.codes[nearest(m, x)], m.wide),
    "layers": lambda m, x: linear(
        gelu(linear(layer_norm(x, (WIDTH,), m.gain), m.wide)), m.wide.t()
    ),
    "norm alone": lambda m, x: layer_norm(x, (WIDTH,)),
    "attention to codes": lambda m, x: softmax(x @ m.codes.t(), -1) @ m.codes,
    "a table that is computed": lambda m, x: linear(m.codes.tanh()[nearest(m, x)], m.wide),
    "other types": lambda m, x: (linear(x, m.wide) * m.fine).sum(-1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@torch.no_grad()
def test_work_stays_within_the_bytes_allowed(name: str) -> None:
    torch.manual_seed(0)
    model = Items(FUNCTIONS[name])
    found = {}
    for most in (2**28, 2**20):
        torch._dynamo.reset()
        run = compiled(model, codebook={"table_bytes": most})
        torch.testing.assert_close(run(IDS), model(IDS))
        graph = table_graph(model)
        details = report_of(run).passes["codebook"].details[-1]
        inputs: dict[int, Any] = {}
        (kept,) = graph.computed.values()
        for index, source in zip(graph.tables.sources, kept.sources, strict=True):
            inputs[index] = source()
        with Peak() as peak:
            tables = graph.tables.computed(inputs)
        for one, other in zip(tables, kept.tables, strict=True):
            torch.testing.assert_close(one, other)
        results = sum(each.numel() * each.element_size() for each in tables)
        assert results == details["table bytes"] <= most
        found[most] = peak.bytes - results
        del tables, kept
    assert found[2**20] <= 2**20
    if name != "norm alone":
        assert found[2**28] > 2**20, "the sizes are too small to tell"


@torch.no_grad()
def test_what_does_not_fit_a_row_at_a_time_is_left() -> None:
    """Rows are looked up in a table that is computed: all of it is there at a time."""

    class Squashed(Items):
        def forward(self, ids: Tensor) -> Tensor:
            return self.function(self, embedding(ids, self.table.tanh()))

    model = Squashed(nearest)
    size = 4 * ITEMS * WIDTH
    run = compiled(model, codebook={"table_bytes": size // 2})
    torch.testing.assert_close(run(IDS), model(IDS))
    (skip,) = report_of(run).passes["codebook"].skipped
    assert "computing a row of it takes" in str(skip)
    run = compiled(model, codebook={"table_bytes": 2 * size})
    torch.testing.assert_close(run(IDS), model(IDS))
    assert report_of(run).passes["codebook"].matched


@pytest.mark.parametrize("ids", [torch.tensor(3), torch.tensor([3, 1]), IDS, IDS[None]])
@pytest.mark.parametrize("by_keyword", [False, True])
@torch.no_grad()
def test_the_last_dimension_is_the_last_of_the_table(ids: Tensor, by_keyword: bool) -> None:
    last = ids.dim()

    def function(m: Any, x: Tensor) -> Tensor:
        rows = softmax(linear(x, m.wide), dim=last) if by_keyword else linear(x, m.wide)
        return rows * m.wide.sum(1) if by_keyword else rows.argmax(last)

    model = Items(function)
    run = compiled(model)
    torch.testing.assert_close(run(ids), model(ids))
    assert report_of(run).passes["codebook"].matched


@pytest.mark.parametrize("wrong", [torch.zeros(3, 2), torch.zeros(2, 2).double(), None])
def test_tables_are_checked_before_they_are_used(wrong: Tensor | None) -> None:
    """Compiled code would read beyond the end of one that is too small."""

    class Given(nn.Module):
        def forward(self, source: Tensor) -> tuple[Tensor, ...]:
            return (source if wrong is None else wrong,)

    slot = Slot("table_0", (2, 2), torch.float32, torch.device("cpu"))
    tables = Constants(Given(), (1,), (slot,))
    inputs = ["another input", torch.ones(2, 2)]
    if wrong is None:
        assert tables.computed(inputs)[0] is inputs[1]
    else:
        with pytest.raises(VerificationError, match="became"):
            tables.computed(inputs)


@torch.no_grad()
def test_names_of_the_model_s_own() -> None:
    """Dynamo calls values what the model's code calls them."""

    class Named(Items):
        def forward(self, ids: Tensor) -> Tensor:
            start = self.codes.square().sum(1)
            shared_0 = self.codes.t()
            stop = embedding(ids, self.table) @ shared_0
            result: Tensor = (start - stop).argmin(-1)
            return result

    model = Named(nearest)
    run = compiled(model)
    torch.testing.assert_close(run(IDS), model(IDS))
    assert report_of(run).passes["codebook"].matched
