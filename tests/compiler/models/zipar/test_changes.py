"""A model that changes between two pictures of one `ZipAR`: each is that of the model as it is.

With a window of all columns the tokens have to be those of `generate`.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accel import ZipAR
from torch import nn
from torch.nn.utils import parametrize, prune

from ....language_models import janus, llama

PROMPT = torch.tensor([[1, 5, 6, 7, 9]])
Change = Callable[[Any], Any]


def negated(module: nn.Module, inputs: Any, output: Any) -> Any:
    return -output


def replace_head(model: Any) -> None:
    torch.manual_seed(1)
    model.lm_head = nn.Linear(32, 40, bias=False)


def wrap_projection(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    attention.q_proj = nn.Sequential(attention.q_proj, nn.Tanh())


def replace_rotary_embedding(model: Any) -> None:
    settings = {"rope_type": "linear", "factor": 0.1, "rope_theta": 10000.0}
    model.config.rope_parameters = settings
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)


def scale_frequencies(model: Any) -> None:
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 9


def scale_attention(model: Any) -> None:
    model.model.layers[0].self_attn.scaling *= 9


def put_in_forward(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    mlp.forward = types.MethodType(lambda self, states: -states, mlp)


def assign_weights(model: Any) -> None:
    model.load_state_dict({k: -v.flip(0) for k, v in model.state_dict().items()}, assign=True)


def set_data(model: Any) -> None:
    model.lm_head.weight.data = model.lm_head.weight.data.flip(0).contiguous()


def write_by_numpy(model: Any) -> None:
    model.lm_head.weight.detach().numpy()[:] *= -1


def resize(model: Any) -> None:
    torch.manual_seed(1)
    model.resize_token_embeddings(60, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[40:].mul_(9)


def untie(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().flip(0).clone())


def retie(model: Any) -> None:
    model.model.embed_tokens.weight = model.lm_head.weight


def parametrize_head(model: Any) -> None:
    parametrize.register_parametrization(model.lm_head, "weight", Flipped())


def prune_head(model: Any) -> None:
    prune.l1_unstructured(model.lm_head, "weight", 0.8)


class Flipped(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.flip(0)


MODULES: list[Change] = [
    lambda model: model.model.layers[0].mlp.register_forward_hook(negated),
    lambda model: model.model.layers[0].mlp._forward_hooks.clear(),
    replace_head, wrap_projection, replace_rotary_embedding, scale_attention, put_in_forward,
]  # fmt: skip
TENSORS: list[Change] = [
    untie, retie, scale_frequencies, assign_weights, set_data, write_by_numpy, parametrize_head,
]  # fmt: skip
FORMS: list[Change] = [
    resize, prune_head, lambda model: model.double(), lambda model: model.float(),
    lambda model: model.bfloat16(), lambda model: model.set_attn_implementation("eager"),
    lambda model: model.train(),
]  # fmt: skip


def drawn(model: Any, zipar: ZipAR) -> tuple[list[int], list[int]]:
    """Tokens by `zipar` and by `generate`."""
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 39}
    found = model.generate(PROMPT, custom_generate=zipar, **settings)
    return found[0, 5:].tolist(), model.generate(PROMPT, **settings)[0, 5:].tolist()


def tiny(**settings: Any) -> Any:
    return llama(num_hidden_layers=1, initializer_range=0.5, **settings)


def decoder() -> ZipAR:
    return ZipAR(2, 3, window=3, options={"lowering": "eager"})


@pytest.mark.parametrize("changes", [MODULES, TENSORS, FORMS], ids=["modules", "tensors", "forms"])
def test_each_change_shows(changes: list[Change]) -> None:
    model, zipar = tiny(tie_word_embeddings=changes is TENSORS), decoder()
    seen = [drawn(model, zipar)]
    for change in changes:
        change(model)
        seen.append(drawn(model, zipar))
    assert [found for found, _ in seen] == [expected for _, expected in seen]
    # A change of precision should not show; but what the first model draws would.
    assert len({tuple(expected) for _, expected in seen}) >= 3


def test_adapters() -> None:
    """Put in, off, another one, merged; and what was seen before is not captured again."""
    import peft

    settings: dict[str, Any] = {
        "target_modules": ["q_proj", "down_proj", "v_proj"], "r": 4, "init_lora_weights": False,
    }  # fmt: skip
    model, zipar = tiny(), decoder()

    def story() -> Iterator[tuple[list[int], list[int]]]:
        yield drawn(model, zipar)
        adapted = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
        yield drawn(adapted, zipar)
        with adapted.disable_adapter():
            yield drawn(adapted, zipar)
        yield drawn(adapted, zipar)
        assert len(zipar.report(model)) == 3
        adapted.add_adapter("other", peft.LoraConfig(**settings))
        adapted.set_adapter("other")
        yield drawn(adapted, zipar)
        adapted.merge_adapter()
        yield drawn(adapted, zipar)

    seen = list(story())
    assert [found for found, _ in seen] == [expected for _, expected in seen]
    assert len({tuple(expected) for _, expected in seen}) >= 3


def test_a_method_of_a_class_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """As kernels for training put themselves in. Dynamo's guards do not see that."""
    model, zipar = tiny(), decoder()
    before, _ = drawn(model, zipar)
    kind = type(model.model.norm)
    plain = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, states: plain(self, states).flip(-1))
    found, expected = drawn(model, zipar)
    assert found == expected != before


def test_weights_are_not_kept() -> None:
    """A step holds the tensors that it was last asked for with, and no others."""
    model, zipar = tiny(), decoder()
    drawn(model, zipar)
    old = weakref.ref(model.lm_head.weight)
    assign_weights(model)
    drawn(model, zipar)
    assert old() is None


def test_autocast() -> None:
    model, zipar = tiny(), decoder()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = drawn(model, zipar)
    assert found == expected
    found, expected = drawn(model, zipar)
    assert found == expected


def test_janus() -> None:
    """Whose view of pictures is made anew for each."""
    model, zipar = janus(), ZipAR(4, 4, window=4, options={"lowering": "eager"})
    prompts = torch.tensor([[1, 5, 6, 2]])
    valid = torch.ones_like(prompts)
    pictures = []
    for _ in range(2):
        expected = model.generate(
            prompts, attention_mask=valid, generation_mode="image", do_sample=False
        )
        found = zipar.janus(model, prompts, valid, do_sample=False)
        assert torch.equal(found, expected)
        pictures.append(found)
        torch.manual_seed(1)
        head = model.model.generation_head
        model.model.generation_head = type(head)(model.config.vq_config)
        assert torch.equal(zipar.janus(model, prompts, valid, do_sample=False), model.generate(
            prompts, attention_mask=valid, generation_mode="image", do_sample=False
        ))  # fmt: skip
    assert not torch.equal(*pictures)
    assert len(zipar.report(model)) == 1
