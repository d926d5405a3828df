"""The rules of decoding that ZipAR is compared to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accel import ZipAR
from accel.examples.autoregressive.bench.baselines import Jacobi, Released
from accel.examples.autoregressive.generator import (
    END_OF_LINE,
    codes_of,
    load_generator,
    prompt_of,
    tokens_of,
)
from accel.examples.autoregressive.tokenizer import CODES, COLUMNS, ROWS, load_tokenizer
from accel.examples.autoregressive.train_generator import nats, seen
from accel.examples.fashion import classifier
from accel.examples.fashion.measure import agreement

from ..compiler.models.zipar.test_handle import EAGER, LINE, PROMPTS, VALID, joint, pictures
from ..language_models import llama


def test_codes_with_ends_of_lines_and_back() -> None:
    codes = torch.randint(256, (2, 16, 16))
    assert torch.equal(codes_of(tokens_of(codes)), codes)
    assert prompt_of(torch.tensor([3, 0])).tolist() == [[260], [257]]
    assert prompt_of(None, 2).tolist() == [[267], [267]]


def test_jacobi_takes_the_likeliest_tokens() -> None:
    model = llama()
    expected = model.generate(PROMPTS, attention_mask=VALID, max_new_tokens=12, do_sample=False)
    jacobi = Jacobi(3, 4, window=4, allowed=range(40), unroll=2, options=EAGER)
    assert torch.equal(pictures(model, jacobi), expected[:, 3:])
    assert jacobi.passes is not None
    assert max(jacobi.passes.tolist()) < 12


def test_jacobi_draws_from_the_right_distribution() -> None:
    choices, many = (3, 11, 20), 20_000
    model = llama(initializer_range=0.5)
    expected = joint(model, [1, 2], choices).flatten() * many
    jacobi = Jacobi(2, 2, window=3, end_of_line=LINE, allowed=choices, options=EAGER)
    tokens = pictures(model, jacobi, torch.tensor([[1, 2]]).expand(many, -1), do_sample=True)
    codes = (tokens[..., None] == torch.tensor(choices)).float().argmax(-1)[:, [0, 1, 3, 4]]
    seen = torch.bincount((codes * torch.tensor([27, 9, 3, 1])).sum(1), minlength=81)
    assert float(((seen - expected) ** 2 / expected).sum()) < 80 + 4 * 12.6


def test_released_mask_lets_unwritten_places_through() -> None:
    """It changes nothing for one token at a time, and something for rows beside each other."""
    model = llama()
    for window, same in ((8, True), (1, False)):
        ours = pictures(model, ZipAR(6, 8, window=window, options=EAGER), do_sample=True)
        theirs = pictures(model, Released(6, 8, window=window, options=EAGER), do_sample=True)
        assert torch.equal(ours, theirs) == same


CLASSES = torch.tensor([0, 8])  # a shirt, a bag


def trained(**settings: Any) -> ZipAR:
    return ZipAR(ROWS, COLUMNS, end_of_line=END_OF_LINE, allowed=range(CODES), **settings)


@pytest.mark.parametrize("window", [COLUMNS, 3])
def test_trained_generator_compiled_and_exported(tmp_path: Path, window: int) -> None:
    """With all columns the tokens of `generate`, ends of lines too; an engine gives the same."""
    model, prompts = load_generator(), prompt_of(CLASSES)
    zipar = trained(window=window, unroll=1)
    sample = window < COLUMNS
    found = pictures(model, zipar, prompts, do_sample=sample)
    if not sample:
        expected = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=False,
            max_new_tokens=zipar.raster.tokens,
        )  # fmt: skip
        assert torch.equal(found, expected[:, 1:])
        return  # engines for `generate`'s tokens: tests/compiler/models/zipar/test_picture.py
    valid = torch.ones_like(prompts)
    engine = zipar.export(
        model, prompts, path=tmp_path / "zipar.onnx", attention_mask=valid, do_sample=True
    )
    torch.manual_seed(0)
    assert torch.equal(engine(prompts, valid, torch.rand(2, zipar.raster.tokens)), found)


@torch.no_grad()
def test_trained_generator_gives_pictures_of_the_class() -> None:
    model, labels = load_generator(), torch.arange(30) % 10
    zipar = trained(window=2, first_row_alone=True, options=EAGER)
    tokens = pictures(model, zipar, prompt_of(labels), do_sample=True, temperature=0.8)
    decoded = load_tokenizer().decode(codes_of(tokens)).clamp(-1, 1)
    assert agreement(classifier.load(), decoded, labels) > 0.5  # by chance 0.1
    assert float(nats(model, prompt_of(labels), tokens)) < 2.0  # by chance 5.5


def test_training_sees_what_decoding_sees() -> None:
    """A token's row of the mask: what has entered by its pass, and comes before it."""
    zipar = trained(window=3)
    visible = seen(3)[0] == 0
    written: set[int] = set()
    for entries in zipar.schedule.passes:
        written |= {entry.slot for entry in entries}
        for entry in entries:
            expected = {slot + 1 for slot in written if slot <= entry.slot}
            assert set(visible[entry.slot + 1].nonzero()[:, 0].tolist()) == expected
