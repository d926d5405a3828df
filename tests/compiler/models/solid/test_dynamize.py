"""`dynamize` on three recommenders: what holds before training, in training, and for bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accel import Dynamics, dynamize, export
from accel.compiler.models.solid.behaviour import BehaviourEncoder, History
from accel.compiler.models.solid.codebook import Codebook
from accel.examples.recommender.backbones import BACKBONES, DYNAMIC
from accel.kernels.errors import OptionError
from torch import Tensor, nn

ITEMS, LABELS = 30, 5
HISTORY = torch.tensor([[0, 0, 3, 7, 9], [1, 2, 3, 4, 5], [0, 0, 0, 0, 29]])
CANDIDATES = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
SEMANTICS = torch.arange(ITEMS) % LABELS
WIDE = Dynamics(width=8)
FORMS: dict[str, dict[str, Any]] = {
    "DUET": {},
    "semantics": {"semantics": SEMANTICS, "dynamics": Dynamics(width=8, metacode=False)},
    "metacode": {"semantics": SEMANTICS},
    "codebook": {"semantics": SEMANTICS, "codebook": torch.randn(LABELS, 8)},
}


def dynamic(name: str, form: str = "codebook", **settings: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = BACKBONES[name](ITEMS)
    given = {"history": "history", "items": ITEMS, "dynamics": WIDE} | FORMS[form] | settings
    return model, dynamize(model, DYNAMIC, **given)


def taught(model: nn.Module) -> nn.Module:
    """With weights that differ from user to user."""
    torch.manual_seed(1)
    with torch.no_grad():
        for each in model.parameters():
            each.add_(torch.randn_like(each) * 0.1)
    return model.eval()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BACKBONES)
def test_before_training_it_is_the_model(name: str, form: str) -> None:
    model, made = dynamic(name, form)
    expected = model(HISTORY, CANDIDATES)
    torch.testing.assert_close(made(HISTORY, candidates=CANDIDATES), expected)
    torch.testing.assert_close(made(candidates=CANDIDATES, history=HISTORY), expected)
    # The layers are 32 wide at least, so a rank of 32 leaves nothing out.
    whole = dynamic(name, form, dynamics=Dynamics(width=8, rank=32, metacode=form != "semantics"))
    torch.testing.assert_close(whole[1](HISTORY, CANDIDATES), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BACKBONES)
def test_weights_are_the_user_s_own(name: str, form: str) -> None:
    """Against a loop over users with plain linear layers."""
    _, made = dynamic(name, form)
    taught(made)
    trunk, remainder, _ = made.hypernetwork(HISTORY)
    scores = made(HISTORY, CANDIDATES)
    for user in range(len(HISTORY)):
        static = BACKBONES[name](ITEMS).eval()
        state = {key: value for key, value in made.model.state_dict().items()
                 if not key.startswith(DYNAMIC)}  # fmt: skip
        for layer, generator in zip(DYNAMIC, made.generators, strict=True):
            weights = generator(
                trunk[user, None], None if remainder is None else remainder[user, None]
            )
            state[f"{layer}.weight"] = weights["weight"][0].t()
            state[f"{layer}.bias"] = weights["bias"][0]
        static.load_state_dict(state)
        alone = static(HISTORY[user, None], CANDIDATES[user, None])
        torch.testing.assert_close(scores[user, None], alone)
    # And they do differ.
    again = made(HISTORY[:1].expand(3, -1), CANDIDATES)
    assert not torch.allclose(again[1:], scores[1:])


@pytest.mark.parametrize("name", BACKBONES)
def test_every_parameter_learns(name: str) -> None:
    """The released code's heads are in plain lists, so that no optimizer finds them."""
    _, made = dynamic(name)
    made = taught(made).train()
    scores, code_loss = made.with_code_loss(HISTORY, CANDIDATES)
    (scores.square().sum() + code_loss).backward()
    without = [key for key, each in made.named_parameters()
               if each.grad is None or not bool(each.grad.abs().sum() > 0)]  # fmt: skip
    assert without == []
    assert float(code_loss.detach()) > 0
    assert "hypernetwork.items.codebook.codes" in dict(made.named_buffers())


def test_remainder_is_bounded_and_learns_at_the_bound() -> None:
    _, made = dynamic("SASRec", "metacode", dynamics=Dynamics(width=8, bound=0.01))
    generator = taught(made).generators[0]
    with torch.no_grad():
        generator.remainder.weight.fill_(1.0)
    trunk, remainder = torch.randn(2, 8), torch.randn(2, 8, requires_grad=True)
    weight = generator(trunk, remainder)["weight"]
    alone = generator.trunk(trunk)[:, : 32 * 32].unflatten(1, (32, 32))
    assert 0.005 < float((weight - alone).abs().max()) <= 0.01 + 1e-6
    weight.sum().backward()
    assert remainder.grad is not None
    assert float(remainder.grad.abs().max()) > 0


@pytest.mark.parametrize("side", ["left", "right", "between"])
def test_padding_changes_nothing(side: str) -> None:
    encoder = BehaviourEncoder(4)
    table = torch.randn(9, 4)
    table[0] = torch.nan  # padding
    rows = {
        "left": [[0, 0, 1, 2], [3, 4, 5, 6], [0, 0, 0, 0]],
        "right": [[1, 2, 0, 0], [3, 4, 5, 6], [0, 0, 0, 0]],
        "between": [[1, 0, 0, 2], [3, 4, 5, 6], [0, 0, 0, 0]],
    }[side]
    read = History(torch.tensor(rows), 0)
    found = encoder(table[read.ids], read.count)
    for row, ids in zip(found, ([1, 2], [3, 4, 5, 6]), strict=False):
        alone = encoder(table[torch.tensor([ids])], torch.tensor([len(ids)]))
        torch.testing.assert_close(row, alone[0])
    torch.testing.assert_close(found[2], encoder.project(torch.zeros(4)))


def test_codes_are_the_nearest() -> None:
    codebook = Codebook(torch.randn(6, 4), straight_through=False)
    embedded = torch.randn(3, 5, 4)
    expected = torch.cdist(embedded, codebook.codes.expand(3, -1, -1)).argmin(-1)
    assert torch.equal(codebook.nearest(embedded), expected)
    assert torch.equal(codebook(embedded)[1], codebook.codes[expected])


@pytest.mark.parametrize("through", [False, True])
def test_straight_through(through: bool) -> None:
    codebook = Codebook(torch.randn(6, 4), through)
    embedded = torch.randn(3, 4, requires_grad=True)
    decoded, codes = codebook(embedded)
    torch.testing.assert_close(decoded, codebook.decode(codes))
    decoded.sum().backward()
    assert (embedded.grad is not None) == through


def test_unknown_items_and_items_without_semantics() -> None:
    """An id beyond the table is the unknown item, and so is any other."""
    labels = SEMANTICS.clone()
    labels[3] = -1
    _, made = dynamic("GRU4Rec", semantics=labels)
    taught(made)
    first, second = (made.hypernetwork(torch.tensor([[5, each]])) for each in (ITEMS, 10**6))
    torch.testing.assert_close(first[:2], second[:2])
    known = made.hypernetwork(torch.tensor([[5, 6]]))
    assert not torch.allclose(first[0], known[0])
    assert made.hypernetwork.semantics.labels[[3, ITEMS]].tolist() == [LABELS, LABELS]


def test_codes_of_a_trained_model_are_a_codebook() -> None:
    _, first = dynamic("SASRec", "semantics")
    _, second = dynamic("SASRec", codebook=first.codes)
    assert torch.equal(first.codes, first.hypernetwork.semantics.table.weight[:-1])
    # An item starts near the code of its semantics.
    read = second.hypernetwork.items
    assert torch.equal(read.codebook.codes, first.codes)
    assert torch.equal(read.codebook.nearest(read.table.weight[:ITEMS]), SEMANTICS)


@pytest.mark.parametrize("form", FORMS)
def test_one_graph(form: str) -> None:
    _, made = dynamic("SASRec", form)
    taught(made)
    compiled = torch.compile(made, backend="accel", fullgraph=True, options={"lowering": "eager"})
    with torch.no_grad():
        for rows in (3, 2):
            history, candidates = HISTORY[:rows], CANDIDATES[:rows]
            torch.testing.assert_close(
                compiled(history, candidates), made(history, candidates), rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("rank", [None, 4])
@torch.no_grad()
def test_weights_can_be_kept(tmp_path: Path, rank: int | None) -> None:
    """Those of each user are made alone, kept, and handed in together; also by engines."""
    _, made = dynamic("DIN", dynamics=Dynamics(width=8, rank=rank))
    generate, score = taught(made).split()
    expected = made(HISTORY, CANDIDATES)
    kept = [generate(row[None]) for row in HISTORY]
    together = {name: torch.cat([each[name] for each in kept]) for name in kept[0]}
    torch.testing.assert_close(score(together, HISTORY, CANDIDATES), expected)
    options = {"codebook": True}
    first = export(generate, (HISTORY,), path=tmp_path / "weights.onnx", options=options)
    second = export(
        score, (together, HISTORY, CANDIDATES), path=tmp_path / "scores.onnx", options=options
    )
    torch.testing.assert_close(
        second(first(HISTORY), HISTORY, CANDIDATES), expected, rtol=1e-5, atol=1e-5
    )


def test_the_model_itself_stays() -> None:
    model, made = dynamic("DIN")
    before = {key: each.clone() for key, each in model.state_dict().items()}
    taught(made)
    assert all(torch.equal(before[key], each) for key, each in model.state_dict().items())
    assert type(model.get_submodule("user.0")) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype: torch.dtype) -> None:
    model = BACKBONES["GRU4Rec"](ITEMS).to(dtype)
    made = dynamize(model, DYNAMIC, history="history", items=ITEMS, semantics=SEMANTICS)
    assert made(HISTORY, CANDIDATES).dtype == dtype
    torch.testing.assert_close(made(HISTORY, CANDIDATES), model(HISTORY, CANDIDATES))


SHORT: Tensor = SEMANTICS[:-1]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"layers": ["user.1"]}, r"no nn.Linear of SASRec.*did you mean 'user"),
        ({"layers": []}, "no layer is named"),
        ({"layers": ["user.0", "user.0"]}, "twice"),
        ({"history": "clicks"}, "takes history, candidates, but no 'clicks'"),
        ({"semantics": SHORT}, r"shape \[29\]; needed is one label for each of the 30"),
        ({"semantics": torch.full((ITEMS,), -1)}, "gives no item a label"),
        ({"codebook": torch.randn(5, 8)}, "give semantics"),
        ({"semantics": SEMANTICS, "codebook": torch.randn(5, 9)}, r"needed is \[codes, 8\]"),
    ],
)
def test_refusals(settings: dict[str, Any], says: str) -> None:
    given = {"layers": DYNAMIC, "history": "history", "items": ITEMS, "dynamics": WIDE} | settings
    with pytest.raises(OptionError, match=says):
        dynamize(BACKBONES["SASRec"](ITEMS), given.pop("layers"), **given)


def test_calls_that_cannot_be() -> None:
    _, made = dynamic("SASRec")
    with pytest.raises(OptionError, match="lacks 'history'"):
        made(candidates=CANDIDATES)
    for wrong in (HISTORY[0], HISTORY.float()):
        with pytest.raises(OptionError, match="needed are ids of items"):
            made(wrong, CANDIDATES)
    with pytest.raises(OptionError, match="call the model that dynamize"):
        made.model(HISTORY, CANDIDATES)
    weights = {"weight": torch.randn(3, 4, 4), "bias": torch.randn(3, 4)}
    with pytest.raises(OptionError, match="has 6 rows, but the batch has 3"):
        torch.func.functional_call(made.model.user[0], weights, torch.randn(6, 4))


@pytest.mark.parametrize("values", [{"width": 0}, {"rank": 0}, {"bound": 0.0}])
def test_dynamics_out_of_range(values: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        Dynamics(**values)
