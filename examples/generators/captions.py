"""Real pictures and clips with captions.

Emoji: `npm pack emoji-datasource-google@16.0.0` (Noto images, Apache-2.0). Fashion-MNIST:
`apt-get install dataset-fashion-mnist`. Games: `pip install ale-py`, with a game's name each.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...compiler.extras import optional
from ..fashion import data as fashion
from ..video import games
from .base import Data

__all__ = ["clips", "described_fashion", "emoji"]

SIDE = 32  # pixels of emoji and of clips
WORDS = 8  # of a caption


def numbered(captions: list[list[str]]) -> tuple[Tensor, list[str]]:
    """Captions as numbers of their words, `[count, WORDS]`, and the words."""
    words = ["", "nothing", *sorted({word for caption in captions for word in caption})]
    number = {word: index for index, word in enumerate(words)}
    table = torch.zeros(len(captions), WORDS, dtype=torch.long)
    for row, caption in enumerate(captions):
        for column, word in enumerate(caption[:WORDS]):
            table[row, column] = number[word]
    return table, words


def emoji(archive: Path | None, *, by_category: bool) -> Data:
    """All emoji on white, uint8 `[count, 3, 32, 32]`, captioned by name, or by category's number.

    Raises FileNotFoundError with the command that gets the archive.
    """
    if archive is None or not archive.exists():
        raise FileNotFoundError(
            f"The emoji's archive is not at {archive}: get it by "
            "npm pack emoji-datasource-google@16.0.0, and give its path as --data."
        )
    image: Any = optional("PIL.Image", "examples")
    pictures, captions, categories = [], [], []
    with tarfile.open(archive) as files:
        by_name = {Path(each.name).name: each for each in files if "/img/google/64/" in each.name}
        listed = files.extractfile("package/emoji.json")
        assert listed is not None
        for entry in json.load(listed):
            # One with each tone of skin: its picture, and the names of the tones.
            for shown in [entry, *entry.get("skin_variations", {}).values()]:
                member = by_name.get(shown["image"])
                if member is None:
                    continue
                packed = files.extractfile(member)
                assert packed is not None
                picture = image.open(io.BytesIO(packed.read())).convert("RGBA")
                white = image.new("RGBA", picture.size, "white")
                flat = image.alpha_composite(white, picture).convert("RGB").resize((SIDE, SIDE))
                pixels = torch.frombuffer(bytearray(flat.tobytes()), dtype=torch.uint8)
                pictures.append(pixels.view(SIDE, SIDE, 3).permute(2, 0, 1))
                name = (entry["name"] or entry["short_name"]).lower()
                plain = "".join(letter if letter.isalnum() else " " for letter in name)
                tone = shown is not entry
                captions.append([*(["tone"] if tone else []), *plain.split()])
                categories.append(entry["category"])
    samples = torch.stack(pictures)
    if by_category:
        names = sorted(set(categories))
        numbers = torch.tensor([[names.index(each)] for each in categories])
        return Data(samples, numbers, [])
    return Data(samples, *numbered(captions))


def described_fashion() -> Data:
    """Fashion-MNIST, uint8 `[count, 1, 28, 28]`, described by what can be measured of it: how
    bright, wide and even it is (a third of all each), and what it is.
    """
    pictures, labels = fashion.load("train")
    shown = pictures > -0.8
    inside = shown.flatten(1).sum(1).clamp(min=1)
    light = ((pictures + 1) * shown).flatten(1).sum(1) / inside
    width = shown.any(2).flatten(1).sum(1).float()
    squares = (pictures + 1 - light.view(-1, 1, 1, 1)).square() * shown
    spread = squares.flatten(1).sum(1) / inside
    described = []
    for value, names in (
        (light, ("dark", "grey", "bright")),
        (width, ("narrow", "medium", "wide")),
        (spread, ("plain", "shaded", "patterned")),
    ):
        limits = value.quantile(torch.tensor([1 / 3, 2 / 3]))
        described.append([names[each] for each in torch.bucketize(value, limits).tolist()])
    captions = [
        [*words, *fashion.CLASSES[label].replace("-", " ").split()]
        for *words, label in zip(*described, labels.tolist(), strict=True)
    ]
    return Data(((pictures + 1) * 127.5).round().to(torch.uint8), *numbered(captions))


def clips(frames: int, seeds: int = 2, count: int = 1500) -> Data:
    """Clips of games, uint8 `[count, 3, frames, 32, 32]`, each with the name of its game."""
    samples, captions = [], []
    for game, title in games.GAMES.items():
        for seed in range(seeds):
            screens = torch.stack(list(games.screens(game, seed, count))).permute(0, 3, 1, 2)
            small = torch.cat(
                [
                    functional.interpolate(
                        part[:, :, :208].float(), (SIDE, SIDE), mode="bilinear", antialias=True
                    )
                    for part in screens.split(100)
                ]
            )
            small = small.round().clamp(0, 255).to(torch.uint8)
            windows = small.unfold(0, 2 * frames - 1, 2)[..., ::2].permute(0, 1, 4, 2, 3)
            samples.append(windows.contiguous())
            captions += [title.lower().split()] * len(windows)
    return Data(torch.cat(samples), *numbered(captions))
