"""The small video model's parts, with a tiny random language model instead of SmolLM2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accel.examples.smollm2.subject import Subject
from accel.examples.video import measure
from accel.examples.video.games import GAMES, PATCHES, WIDTH, Video, make_video, recording
from accel.examples.video.model import Projector, answer_of, load_projector
from accel.examples.video.train import loss_of
from accel.kernels.omnisparse.selection import Choice
from torch import Tensor

from .test_smollm2 import llama


class Letters:
    """A tokenizer: each letter is a token."""

    def __call__(self, text: str, return_tensors: str) -> Any:
        found = type("Encoded", (), {})()
        found.input_ids = torch.tensor([[ord(letter) % 64 for letter in text]])
        return found

    def decode(self, tokens: Tensor) -> str:
        return "".join(chr(64 + token) for token in tokens.tolist())


def video(frames: int, scenes: int, seed: int) -> Video:
    return make_video(frames, scenes, [0], torch.Generator().manual_seed(seed))


def test_videos_show_what_they_say() -> None:
    shown = video(40, 3, 1)
    assert shown.patches.shape == (40, PATCHES, WIDTH)
    assert len(set(shown.scenes)) == 3
    names = {name: game for game, name in GAMES.items()}
    frames = [
        set(map(bytes, recording(names[name], 0).flatten(1).numpy())) for name in shown.scenes
    ]
    own = [[bytes(frame) in each for each in frames] for frame in shown.patches.flatten(1).numpy()]
    order = [row.index(True) for row in own]
    assert order == sorted(order)
    assert all(order.count(scene) >= 40 // 6 for scene in range(3))
    assert video(40, 3, 1).patches.equal(shown.patches)


def test_losses_of_several_are_the_mean_over_their_tokens() -> None:
    """Padding between videos of other lengths is not read."""
    model, projector, tokenizer = llama(), Projector(32, 8), Letters()
    videos = [video(6, 1, 1), video(9, 3, 2)]
    sizes = [len(answer_of(each.scenes, tokenizer)) for each in videos]
    together, _ = loss_of(model, projector, tokenizer, videos)
    single = [loss_of(model, projector, tokenizer, [each])[0] for each in videos]
    wanted = sum(size * loss for size, loss in zip(sizes, single, strict=True)) / sum(sizes)
    torch.testing.assert_close(together, wanted)
    together.backward()
    assert all(each.grad is not None and each.grad.norm() > 0 for each in projector.parameters())


def test_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SEEDS", [0])
    subject = Subject(llama(), Letters(), torch.zeros(0))
    torch.manual_seed(0)
    caches, prefills = [{"recall": 1.0}, {"recall": 0.3}], [Choice(1.0)]
    rows = measure.answered(subject, Projector(32, 8), 2, caches, prefills, str, frames=150)
    full, exact, everything, slim = rows
    assert (full.agreement, exact.agreement, everything.agreement) == (1, 1, 1)
    assert everything.fewer_bytes == pytest.approx(1, abs=0.15)  # positions are held, too
    assert slim.fewer_bytes > 1.2
    assert full.right == 0  # it is random


def test_the_trained_projector() -> None:
    tokens = load_projector()(video(3, 1, 0).patches)
    assert tokens.shape == (8 + 3 * PATCHES + 8, 576)
    assert tokens.isfinite().all()
