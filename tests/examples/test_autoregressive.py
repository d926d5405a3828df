"""The rules of decoding that ZipAR is compared to."""

from __future__ import annotations

import torch
from accel.examples.autoregressive.bench.baselines import Jacobi, Released
from accel.examples.autoregressive.generator import codes_of, prompt_of, tokens_of

from ..compiler.zipar.test_handle import EAGER, LINE, PROMPTS, VALID, joint, pictures
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
    from accel import ZipAR

    model = llama()
    for window, same in ((8, True), (1, False)):
        ours = pictures(model, ZipAR(6, 8, window=window, options=EAGER), do_sample=True)
        theirs = pictures(model, Released(6, 8, window=window, options=EAGER), do_sample=True)
        assert torch.equal(ours, theirs) == same
