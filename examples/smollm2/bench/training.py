"""Fine-tuning with sparse attention and with dense, on the same text in the same order."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..subject import FIRST, Subject

__all__ = ["LENGTH", "losses"]

RATE = 2e-5
LENGTH = 2048  # tokens of a step
APART = 100_000  # tokens from the text that is measured to the text that is trained on


def losses(
    subject: Subject, options: dict[str, Any] | None, steps: int, progress: Callable[[str], None]
) -> list[float]:
    """Of each step before it is taken, and last of the text that is measured, dense.

    options: of the accel backend; None: plain Inductor.
    """
    model = copy.deepcopy(subject.model)
    model.set_attn_implementation("sdpa")
    given: Any = {} if options is None else {"backend": "accel", "options": options}
    compiled = torch.compile(model, fullgraph=True, dynamic=False, **given)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    found = []
    for step in range(steps):
        start = FIRST + APART + step * LENGTH
        loss = _loss(compiled, subject.text[start : start + LENGTH])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
        progress(f"step {step + 1}: loss {found[-1]:.4f}")
    with torch.no_grad():
        found.append(float(_loss(model, subject.text[FIRST : FIRST + LENGTH])))
    return found


def _loss(model: Any, tokens: Tensor) -> Tensor:
    loss: Tensor = model(tokens[None], labels=tokens[None], use_cache=False).loss
    return loss
