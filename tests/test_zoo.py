"""Every transformer class of diffusers that Dynamo captures whole, with no line of model code.

One graph, the stack found (or a stated reason), computed steps equal to eager, each step of Euler's
method proven to continue the one before, and skip steps that really skip: the blocks are not run.
"""

from __future__ import annotations

import accel
import pytest
import torch
from accel.compiler.runtime.steps import Root
from accel.tests.models import without_blocks
from accel.tests.zoo import ENTRIES, TIME_INDEPENDENT
from accel.tests.zoo.parts import next_inputs, step_inputs, tensors

# Why the Padé pass leaves these alone. Each is a property of the model as captured.
DECLINED = {
    **dict.fromkeys(TIME_INDEPENDENT, "no timestep"),
    "Kandinsky6SRTransformer3DModel": "side effects",  # builds a block mask by vmap in each block
    "MochiTransformer3DModel": "depends on data",  # drops padded prompt tokens in each block
    "SanaWMTransformer3DModel": "no timestep",  # the way to its embedding is not recognised
    "NucleusMoEImageTransformer2DModel": "depends on data",  # routes tokens to experts
}

# Their sample is not recognised (it is packed into one sequence with the text): every call looks
# like a run of its own: computed, never wrong, nothing gained, and `stats` shows it.
ALWAYS_COMPUTED = {"BriaFibo2Transformer2DModel", "Cosmos3OmniTransformer"}


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_transformer(name: str) -> None:
    torch.set_num_threads(1)
    entry = ENTRIES[name]
    model = entry.build()
    # Random weights predict badly; what is tested is that the step is skipped.
    pade_options = {"schedule": [0, 1, 2, 9], "max_error": 1e9}
    options = {"lowering": "eager", "verify": True, "pade": pade_options}
    fast = torch.compile(model, backend="accel", fullgraph=True, options=options)
    with torch.no_grad():
        inputs = step_inputs(entry, 0)
        for step in range(3):
            expected, got = model(**inputs), fast(**inputs)
            for one, other in zip(tensors(got), tensors(expected), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
            inputs = next_inputs(entry, inputs, got, step + 1)
        stats = accel.stats(fast)
        report = accel.report_of(fast)
        pade = report.passes["pade"]
        if name in DECLINED:
            assert not pade.matched
            assert any(DECLINED[name] in str(skip) for skip in pade.skipped), pade.skipped
            assert stats.full_steps == 0
            return
        assert len(pade.matched) == 1, pade.skipped
        assert (stats.full_steps, stats.recompiles) == (3, 0)
        if name in ALWAYS_COMPUTED:
            assert stats.runs == 3
            assert set(stats.roots) == {Root.BLIND}
            return
        assert stats.runs == 1
        with without_blocks(model):
            predicted = tensors(fast(**inputs))
    assert accel.stats(fast).predicted_steps == 1
    assert all(torch.isfinite(each).all() for each in predicted)
