"""Engines that decode a whole picture in one call."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accel import ZipAR, load
from accel.kernels.errors import EngineError

from ....language_models import KINDS, janus, llama

PROMPTS = torch.tensor([[1, 2, 3], [39, 4, 5]])
VALID = (PROMPTS != 39).long()
LINE = 37
DRAWN: dict[str, Any] = {"attention_mask": VALID, "do_sample": True, "top_k": 9}


@pytest.mark.parametrize(
    ("suffix", "adaptive", "guidance"),
    [(".onnx", False, None), (".onnx", True, 2.0), (".pt2", False, 2.0)],
)
def test_same_tokens_as_compiled(
    tmp_path: Path, suffix: str, adaptive: bool, guidance: float | None
) -> None:
    model = llama()
    zipar = ZipAR(
        3, 4, window=2, adaptive=adaptive, end_of_line=LINE, options={"lowering": "eager"}
    )  # fmt: skip
    settings = DRAWN | ({"guidance_scale": guidance} if guidance else {})
    zipar.export(model, PROMPTS, path=tmp_path / f"zipar{suffix}", **settings)
    engine = load(tmp_path / f"zipar{suffix}")
    rows, valid = PROMPTS, VALID
    if guidance:  # without the prompt is its last token alone
        without = PROMPTS.clone()
        without[:, :-1] = 39
        rows, valid = torch.cat([rows, without]), torch.cat([valid, (without != 39).long()])
    for seed in (0, 1):
        torch.manual_seed(seed)
        expected = model.generate(PROMPTS, custom_generate=zipar, **settings)[:, 3:]
        torch.manual_seed(seed)
        random = [torch.rand(2, 15)]
        if adaptive:
            random.append(torch.rand(2, 12 + zipar.unroll, 2))
        assert torch.equal(engine(rows, valid, *random), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_window_of_all_columns_is_generate(tmp_path: Path, kind: str) -> None:
    model = KINDS[kind]()
    expected = model.generate(
        PROMPTS, attention_mask=VALID, max_new_tokens=12, do_sample=False, pad_token_id=39
    )[:, 3:]
    zipar = ZipAR(3, 4, window=4)
    engine = zipar.export(
        model, PROMPTS, path=tmp_path / "zipar.onnx", attention_mask=VALID, do_sample=False
    )
    assert torch.equal(engine(PROMPTS, VALID, torch.rand(2, 12)), expected)


def test_janus(tmp_path: Path) -> None:
    model = janus()
    prompts = torch.tensor([[1, 5, 6, 2], [39, 1, 7, 2]])
    valid = (prompts != 39).long()
    settings: dict[str, Any] = {
        "generation_mode": "image", "do_sample": False, "guidance_scale": 3.0, "max_length": 64,
    }  # fmt: skip
    expected = model.generate(prompts, attention_mask=valid, **settings)
    zipar = ZipAR(4, 4, window=4)
    path = tmp_path / "zipar.onnx"
    engine = zipar.export(model, prompts, path=path, attention_mask=valid, **settings)
    without = torch.where((prompts == 1) | (prompts == 2), prompts, 39)
    rows, seen = torch.cat([prompts, without]), torch.cat([valid, valid])
    assert torch.equal(engine(rows, seen, torch.rand(2, 16)), expected)


def test_another_size_is_refused(tmp_path: Path) -> None:
    zipar = ZipAR(2, 3, window=2, options={"lowering": "eager"})
    engine = zipar.export(llama(), PROMPTS, path=tmp_path / "zipar.onnx", attention_mask=VALID)
    with pytest.raises(EngineError, match="input_ids"):
        engine(PROMPTS[:1], VALID[:1], torch.rand(1, 6))
