"""The small generators that forecasts are judged on: their data, their training, their sampling."""

from __future__ import annotations

import io
import json
import tarfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from accel.examples.generators import GENERATORS, base
from accel.examples.generators.base import Data, Generator
from accel.examples.generators.captions import emoji, numbered
from accel.examples.generators.flux import packed, unpacked
from accel.examples.generators.judge import Judged, Row, left_out
from accel.examples.generators.train import Training, train
from PIL import Image

NAMES = sorted(GENERATORS)
WORDS = ["", "nothing", "red", "round", "hat"]


def made(kind: Generator, count: int = 6) -> Data:
    """Random samples; conditions as its own data has them."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.randint(0, 256, (count, *kind.shape), generator=generator, dtype=torch.uint8)
    if kind.name == "dit":
        return Data(samples, torch.arange(count)[:, None] % 10, [])
    captions = torch.randint(2, 5, (count, 8), generator=generator)
    captions[:, 5:] = 0
    return Data(samples, captions, WORDS)


def small(name: str, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Generator:
    kind = GENERATORS[name]
    for key, value in {"batch": 2, "steps": 4, **settings}.items():
        monkeypatch.setattr(type(kind), key, value)
    return kind


@pytest.mark.parametrize("name", NAMES)
def test_what_is_corrupted_can_be_recovered_from_its_target(name: str) -> None:
    kind = GENERATORS[name]
    draw = torch.Generator().manual_seed(1)
    clean, noise = torch.rand(5, *kind.shape) * 2 - 1, torch.randn(5, *kind.shape)
    noisy, times, target = kind.corrupt(clean, noise, draw)
    assert times.shape == (5,)
    assert times.dtype is torch.float32
    assert len(set(times.tolist())) > 1
    if name in ("flux", "wan"):
        mix = (times / 1000).view(-1, *[1] * (clean.ndim - 1))
        signal, spread = 1 - mix, mix
        recovered = noisy - mix * target
    else:
        kept = kind.noising.alphas_cumprod[times.long()].view(-1, 1, 1, 1)
        signal, spread = kept.sqrt(), (1 - kept).sqrt()
        recovered = (
            signal * noisy - spread * target
            if name == "dit"
            else (noisy - spread * target) / signal
        )
    torch.testing.assert_close(noisy, signal * clean + spread * noise, rtol=1e-4, atol=1e-4)
    some = signal.flatten() > 0.05  # where hardly any of the sample is left, little can be
    torch.testing.assert_close(recovered[some], clean[some], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = small(name, monkeypatch, distilled=0.5 if name == "flux" else 1.0)
    samples, conditions, words = made(kind)
    whole = Training(kind, len(words), seed=3)
    for step in range(4):
        if step == 3:
            whole.save(tmp_path / "state.pt")
        assert whole.advance(samples, conditions, 1e-3) > 0
    assert (whole.teacher is not None) == (name == "flux")
    resumed = Training(kind, len(words), seed=3)
    resumed.resume(tmp_path / "state.pt")
    resumed.advance(samples, conditions, 1e-3)
    for one, other in ((whole.network, resumed.network), (whole.average, resumed.average)):
        for left, right in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(left, right)


@pytest.mark.parametrize("name", NAMES)
def test_trained_written_loaded_and_sampled(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = small(name, monkeypatch)
    data = made(kind, count=70)
    train(kind, data, tmp_path / "state.pt", tmp_path, compiled=False)
    assert (tmp_path / f"{name}_training.csv").read_text().splitlines()[-1].startswith("4,")
    network, conditions, words = kind.load(tmp_path / f"{name}.safetensors")
    assert words == data.words
    assert conditions.shape == (64, data.conditions.shape[1])
    noise = torch.randn(2, *kind.shape, generator=torch.Generator().manual_seed(0))

    def sampled(told: torch.Tensor, **settings: Any) -> list[torch.Tensor]:
        return list(kind.sample(network, noise, told, steps=4, **settings))

    told = torch.tensor([[2] * 8, [3] * 8])[:, : conditions.shape[1]]
    states = sampled(told)
    assert len(states) == 4
    assert states[-1].shape == noise.shape
    assert torch.isfinite(states[-1]).all()
    assert torch.equal(states[-1], sampled(told)[-1])
    for other in (sampled(told.flip(0))[-1], sampled(told, guidance=7.0)[-1]):
        assert (states[-1] - other).abs().max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_untrained_blocks_change_nothing(name: str) -> None:
    """Each block begins as the identity, and every parameter that begins as zero is named."""
    kind = GENERATORS[name]
    training = Training(kind, len(WORDS), seed=0)
    for pattern in kind.zeroed:
        named = [key for key, _ in training.network.transformer.named_parameters()]
        assert any(fnmatch(key, pattern) for key in named), pattern
    told = kind.embed(training.network, made(kind).conditions[:2])
    noise = torch.randn(2, *kind.shape)
    output = kind.predict(training.network.transformer, noise, torch.full((2,), 500.0), told)
    assert output.shape == noise.shape
    assert output.abs().max() == 0


def test_pictures_as_tokens_and_back() -> None:
    picture = torch.randn(2, 3, 32, 32)
    tokens = packed(picture)
    assert tokens.shape == (2, 64, 48)
    assert torch.equal(unpacked(tokens), picture)
    assert set(tokens[0, 9].tolist()) == set(picture[0, :, 4:8, 4:8].flatten().tolist())


def test_captions_as_numbers() -> None:
    table, words = numbered([["a", "hat"], ["hat"] * 12])
    assert words == ["", "nothing", "a", "hat"]
    assert table.tolist() == [[2, 3, 0, 0, 0, 0, 0, 0], [3] * 8]


def test_emoji_of_an_archive(tmp_path: Path) -> None:
    listed = [
        {"image": "a.png", "name": "RED HAT", "short_name": "hat", "category": "Objects",
         "skin_variations": {"1F3FB": {"image": "b.png"}, "1F3FC": {"image": "missing.png"}}},
        {"image": "c.png", "name": "", "short_name": "up-sign", "category": "Animals"},
    ]  # fmt: skip
    path = tmp_path / "emoji.tgz"
    with tarfile.open(path, "w:gz") as files:
        for name, colour in (("a", (255, 0, 0, 255)), ("b", (0, 0, 0, 0)), ("c", (0, 0, 255, 255))):
            packed_picture = io.BytesIO()
            Image.new("RGBA", (64, 64), colour).save(packed_picture, "PNG")
            _add(files, f"package/img/google/64/{name}.png", packed_picture.getvalue())
        _add(files, "package/emoji.json", json.dumps(listed).encode())
    samples, captions, words = emoji(path, by_category=False)
    assert samples.shape == (3, 3, 32, 32)
    assert samples[:, :, 5, 5].tolist() == [[255, 0, 0], [255, 255, 255], [0, 0, 255]]
    told = [[words[index] for index in caption if index] for caption in captions.tolist()]
    assert told == [["red", "hat"], ["tone", "red", "hat"], ["up", "sign"]]
    assert emoji(path, by_category=True).conditions.tolist() == [[1], [1], [0]]


def _add(files: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    files.addfile(entry, io.BytesIO(content))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="npm pack emoji-datasource-google"):
        emoji(tmp_path / "none.tgz", by_category=True)
    with pytest.raises(FileNotFoundError, match=r"accel\.examples\.generators\.train flux"):
        GENERATORS["flux"].load(tmp_path / "none.safetensors")


def test_the_page_says_what_they_are() -> None:
    text = (Path(base.__file__).parent / "README.md").read_text()
    rows = [f"| `{name}` | {kind.what} |" for name, kind in GENERATORS.items()]
    assert [line for line in text.splitlines() if line.startswith("| `")] == rows


# Judging


def test_a_judged_model_samples_as_the_plain_one() -> None:
    """Everything computed, through the back end, from a checkpoint that is committed."""
    judged = Judged("dit", batch=2)
    kind = GENERATORS["dit"]
    network, conditions, _ = kind.load()
    draw = torch.Generator().manual_seed(5)
    noise = torch.randn(2, *kind.shape, generator=draw)
    told = conditions[(torch.arange(2) + 5) % len(conditions)]
    *_, expected = kind.sample(network, noise, told, steps=5)
    got = judged.attempt(None, 5, 5)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert got.abs().max() <= 1


def test_what_is_chosen_on_the_others() -> None:
    """The best rule of the other models, and the best one here."""

    def row(model: str, rule: str, psnr: float, seed: int = 0) -> Row:
        return Row(model, 20, 8, rule, 1.0, 1, 0.75, seed, psnr)

    rows = [
        row("a", "one", 40), row("a", "two", 30), row("b", "one", 30), row("b", "two", 31),
        row("c", "one", 20, 0), row("c", "one", 30, 1), row("c", "two", 38, 0),
        row("c", "two", 40, 1),
    ]  # fmt: skip
    made = {each["model"]: each for each in left_out(rows)}
    assert made["a"]["chosen on the others"].startswith("two")
    assert made["a"]["psnr"] == 30
    assert made["a"]["best here"].startswith("one")
    assert made["a"]["its psnr"] == 40
    assert made["c"]["chosen on the others"].startswith("one")
    assert made["c"]["psnr"] == 25
    assert made["c"]["its psnr"] == 39
