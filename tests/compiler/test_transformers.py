"""Models of transformers, called as their users call them: default arguments, default options.

A language model then returns its cache, what Dynamo can't capture whole comes in several graphs,
and there is nothing that Padé could skip. The model has to do what it did.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import accel
import pytest
import torch
from accel.passes.base import Reason
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache

from .. import transformers_zoo as zoo

FAULTS = (Reason.RAISED, Reason.BROKEN)
# Some of each sort: what is compiled has passed through the same passes in any case.
EXPLAINED = (
    "decoder llama", "decoder gemma2", "decoder gpt2", "decoder bloom", "decoder ctrl",
    "decoder mixtral", "decoder gpt_oss", "decoder deepseek_v3", "encoder albert",
    "encoder modernbert", "encoder dinov2", "encoder wav2vec2", "encoder-decoder t5",
    "encoder-decoder whisper", "vision-language clip", "vision-language llava",
    "vision-language vilt",
)  # fmt: skip


def leaves(output: Any) -> Iterator[Tensor]:
    """All tensors of an output: those of caches, and of outputs in it, too."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, EncoderDecoderCache):
        yield from leaves([output.self_attention_cache, output.cross_attention_cache])
    elif isinstance(output, Cache):
        yield from leaves(output.layers)
    elif isinstance(output, dict):
        yield from leaves(list(output.values()))
    elif isinstance(output, list | tuple):
        for each in output:
            yield from leaves(each)
    elif isinstance(output, CacheLayerMixin) or hasattr(output, "__dict__"):
        yield from leaves(vars(output))


def faults(report: accel.Report) -> list[str]:
    """Where a pass failed, rather than found that it does not apply."""
    passes = report.passes.values()
    return [str(skip) for each in passes for skip in each.skipped if skip.reason in FAULTS]


@pytest.mark.parametrize("kind", zoo.KINDS)
@torch.no_grad()
def test_a_model_does_what_it_did(kind: str) -> None:
    torch.set_num_threads(1)
    model, inputs = zoo.build(kind)
    torch.manual_seed(1)  # some draw
    wanted = list(leaves(model(**inputs)))
    fast = torch.compile(model, backend="accel", options={"lowering": "eager"})
    torch.manual_seed(1)
    got = list(leaves(fast(**inputs)))
    assert len(got) == len(wanted) > 0
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert faults(accel.report_of(fast)) == []


@pytest.mark.parametrize("kind", EXPLAINED)
@torch.no_grad()
def test_a_model_is_explained(kind: str) -> None:
    torch.set_num_threads(1)
    model, inputs = zoo.build(kind)
    explained = accel.explain(model, **inputs)
    assert explained.graphs
    assert faults(explained) == []
