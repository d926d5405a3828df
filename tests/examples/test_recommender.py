"""What the recommenders' experiment is made of, on a few users of our own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accel.examples.recommender.backbones import BACKBONES
from accel.examples.recommender.data import LENGTH, MovieLens, left_padded
from accel.examples.recommender.experiment import Task, models, plotted, summary, tasks
from accel.examples.recommender.measure import ranking, scores_of
from accel.examples.recommender.semantics import by_genre
from accel.examples.recommender.train import Recipe, trained

GENRES = ((), ("Drama",), ("Drama",), ("Comedy",), ("Comedy", "Drama"), (), ("Drama",))
FILMS = MovieLens(
    users=(torch.tensor([1, 2, 3, 4, 5]), torch.tensor([6, 5, 4, 1])),
    titles=tuple("abcdefg"),
    genres=GENRES,
)


def test_leave_one_out() -> None:
    histories, targets, seen = FILMS.held_out(1)
    assert targets.tolist() == [5, 1]
    assert [row[row > 0].tolist() for row in histories] == [[1, 2, 3, 4], [6, 5, 4]]
    assert [row.nonzero()[:, 0].tolist() for row in seen] == [[0, 1, 2, 3, 4], [0, 4, 5, 6]]
    assert FILMS.held_out(2)[1].tolist() == [4, 4]
    users, places = FILMS.examples()  # neither a first item, nor one that is held out
    before, wanted = FILMS.histories(users, places)
    assert wanted.tolist() == [2, 3, 5]
    assert [row[row > 0].tolist() for row in before] == [[1], [1, 2], [6]]


def test_histories_end_at_the_right() -> None:
    (row,) = left_padded([torch.arange(1, LENGTH + 4)])
    assert row.tolist() == [*range(4, LENGTH + 4)]


def test_ranking() -> None:
    scores = torch.tensor([[9.0, 0.5, 0.9, 0.1, 0.7], [9.0, 0.3, 0.2, 0.6, 0.3]])
    seen = torch.zeros(2, 5, dtype=torch.bool)
    seen[:, 0] = True
    seen[1, 3] = True
    found = ranking(scores, torch.tensor([4, 1]), seen)
    # The first user's item is second of four; the second's ties for the first place of three.
    assert found.uauc == pytest.approx((1 - 1 / 3 + 1 - 0.5 / 2) / 2)
    assert found.hit_rate == (1.0, 1.0, 1.0)
    gains = 1 / torch.log2(torch.tensor([1.0, 0.5]) + 2)
    assert found.ndcg[1] == pytest.approx(float(gains.mean()))
    # Of negatives 0.5, 0.9, 0.1, 0.2 and 0.3: 0.7 is above four, 0.3 above two and beside one.
    assert found.auc == pytest.approx((4 / 5 + 2.5 / 5) / 2)


def test_labels_by_genre() -> None:
    labels = by_genre(FILMS, fewest=2)
    assert labels.tolist() == [-1, 0, 0, labels[3].item(), 0, -1, 0]
    assert labels[3] not in (-1, 0)


@pytest.mark.parametrize("generator", ["DUET", "APG"])
def test_what_is_trained(generator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each form once, SOLID with the codes that the first has learnt."""
    monkeypatch.setattr(Recipe, "epochs", 2)
    monkeypatch.setattr(Recipe, "ranked", 1)
    monkeypatch.setattr(Recipe, "batch", 3)
    task, labels = Task("GRU4Rec", generator, "genres", 0), by_genre(FILMS, fewest=2)
    forms = []
    for form, model in models(task, FILMS, labels):
        before = [each.detach().clone() for each in model.parameters()]
        kept, found, curve = trained(model, FILMS, 0, progress=lambda _: None)
        assert len(curve) == 2
        assert 0 <= found.uauc <= 1
        assert any(not torch.equal(*each) for each in zip(before, kept.parameters(), strict=True))
        forms.append((form, kept.hypernetwork))
    assert [form for form, _ in forms] == ["semantics", "metacode", "SOLID"]
    assert forms[1][1].items.codebook is None
    assert torch.equal(forms[2][1].items.codebook.codes, forms[0][1].codes)
    assert forms[0][1].items is None


def test_every_model_is_there_once() -> None:
    every = list(tasks(3))
    assert len(every) == len(set(every)) == 3 * (6 + 6 + 5)
    assert {each.backbone for each in every} == set(BACKBONES)


def test_longer_histories_than_positions() -> None:
    model = BACKBONES["SASRec"](9).eval()
    history, candidates = torch.randint(1, 9, (2, 60)), torch.arange(9).expand(2, -1)
    torch.testing.assert_close(model(history, candidates), model(history[:, -50:], candidates))


def test_summary(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(
        "backbone,generator,form,semantics,seed,uauc,hr@10,ndcg@5,ndcg@10,ndcg@20\n"
        "DIN,DUET,plain,,0,0.5,0.1,0.1,0.2,0.3\nDIN,DUET,plain,,1,0.7,0.1,0.1,0.4,0.3\n"
    )
    line = summary(path).splitlines()[-1]
    assert "| 2 | 0.6000 ± 0.1414 | 0.1000 ± 0.0000 |" in line
    assert "0.3000 ± 0.1414" in line


def test_plotted(tmp_path: Path) -> None:
    path, picture = tmp_path / "curves.csv", tmp_path / "curves.png"
    path.write_text(
        "backbone,generator,form,semantics,seed,epoch,loss,ndcg@10\n"
        "DIN,static,plain,,0,3,1.0,0.1\nDIN,DUET,plain,,0,3,1.0,0.2\nDIN,DUET,SOLID,text,0,3,1.0,0\n"
    )
    plotted(path, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_scores_of_the_whole_catalogue() -> None:
    model = BACKBONES["DIN"](FILMS.items).eval()
    histories = FILMS.held_out(1)[0]
    found = scores_of(model, histories, FILMS.items, batch=1)
    expected = model(histories, torch.arange(FILMS.items).expand(2, -1))
    torch.testing.assert_close(found, expected.detach())
