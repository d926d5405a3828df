"""The best of a whole catalogue, plain, compiled with tables, and exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accel import Recommender, export, report_of
from accel.examples.recommender.backbones import BACKBONES
from accel.kernels.errors import OptionError

from .test_dynamize import HISTORY, ITEMS, dynamic, taught


def recommender(name: str, **settings: bool) -> Recommender:
    _, made = dynamic(name)
    return Recommender(taught(made), items=ITEMS, top=5, **settings).eval()


@pytest.mark.parametrize("again", [False, True])
@torch.no_grad()
def test_the_best_that_are_new(again: bool) -> None:
    made = recommender("SASRec", again=again)
    history = HISTORY.clone()
    # An unknown item, for which the model has a row beyond the catalogue.
    history[0, 0] = ITEMS
    table = made.model.model.table
    made.model.model.table = torch.nn.Embedding.from_pretrained(
        torch.cat([table.weight, torch.zeros(1, table.embedding_dim)])
    )
    scores, items = made(history)
    whole = made.model(history, torch.arange(ITEMS).expand(len(history), -1))
    for user, row in enumerate(whole):
        seen = {0} if again else {0, *history[user].tolist()}
        expected = [item for item in row.argsort(descending=True).tolist() if item not in seen]
        assert items[user].tolist() == expected[:5]
        torch.testing.assert_close(scores[user], row[items[user]])


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_compiled_with_tables(name: str) -> None:
    made = recommender(name)
    options = {"codebook": True, "lowering": "eager", "verify": True}
    run = torch.compile(made, backend="accel", fullgraph=True, options=options)
    for rows in (3, 2):
        found, expected = run(HISTORY[:rows]), made(HISTORY[:rows])
        torch.testing.assert_close(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
    details = report_of(run).passes["codebook"].details[0]
    # In the others each candidate's vector is multiplied by the user's; DIN looks for it.
    assert details["products with a whole table"] == (0 if name == "DIN" else 1)


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@torch.no_grad()
def test_exported(tmp_path: Path, suffix: str) -> None:
    made = recommender("GRU4Rec")
    path = tmp_path / f"recommender{suffix}"
    engine = export(made, (HISTORY,), path=path, options={"codebook": True})
    found, expected = engine(HISTORY), made(HISTORY)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(found[1], expected[1])
    assert len(engine.manifest.passes[0].matched) == 5


@torch.no_grad()
def test_fewer_than_asked_for() -> None:
    _, made = dynamic("SASRec")
    scores, items = Recommender(taught(made), items=ITEMS, top=ITEMS - 1).eval()(HISTORY)
    new = ITEMS - 1 - 3
    assert torch.isfinite(scores[0, :new]).all()
    assert set(items[0, :new].tolist()).isdisjoint({0, 3, 7, 9})
    assert (scores[0, new:] == -torch.inf).all()


@pytest.mark.parametrize("top", [0, ITEMS])
def test_refusals(top: int) -> None:
    with pytest.raises(OptionError, match="top is"):
        Recommender(BACKBONES["SASRec"](ITEMS), items=ITEMS, top=top)


def test_padding_outside_the_catalogue() -> None:
    with pytest.raises(OptionError, match="padding is 30"):
        Recommender(BACKBONES["SASRec"](ITEMS), items=ITEMS, top=3, padding=ITEMS)
