"""The graph verifier notices broken rewrites."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from accel.kernels.errors import VerificationError
from accel.passes import OutlinePass, PadePass, Program, verify
from accel.passes.graph.nodes import copy_module
from accel.tests.models import dit, noise, program_of
from torch import fx


def captured() -> Program:
    with torch.no_grad():
        return program_of(
            dit(), noise(), timestep=torch.full((2,), 500.0), class_labels=torch.tensor([1, 2])
        )


def drop_an_operand(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if node.target is torch.ops.higher_order.cond:
            node.args = (*node.args[:3], node.args[3][:-1])


def drop_an_output(module: fx.GraphModule) -> None:
    module.graph.output_node().args = ((),)


def swap_the_output(module: fx.GraphModule) -> None:
    (results,) = module.graph.output_node().args
    module.graph.output_node().args = ((results[1], *results[1:]),)


def rename_an_input(module: fx.GraphModule) -> None:
    module.graph.find_nodes(op="placeholder")[0]._rename("other")


def return_the_state_it_got(module: fx.GraphModule) -> None:
    last = module.graph.find_nodes(op="placeholder")[-1]
    (results,) = module.graph.output_node().args
    module.graph.output_node().args = ((*results[:-1], last),)


def lose_a_branch(module: fx.GraphModule) -> None:
    del module.accel_predict_0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_an_operand, "operands"),
        (drop_an_output, "outputs became"),
        (swap_the_output, "not like it"),
        (rename_an_input, "became other"),
        (return_the_state_it_got, "is an input"),
        (lose_a_branch, "nonexistent"),
    ],
)
def test_damage_is_noticed(damage: Callable[[fx.GraphModule], None], message: str) -> None:
    before = captured()
    after, _ = PadePass().run(before)
    verify(before, after, "pade", deep=True)
    broken, _ = copy_module(after.module)
    damage(broken)
    with pytest.raises(VerificationError, match=message):
        verify(before, replace(after, module=broken), "pade")


def test_passes_leave_their_input_alone() -> None:
    before = captured()
    code = before.module.code
    after, _ = PadePass().run(before)
    outlined, _ = OutlinePass().run(after)
    assert before.module.code == code
    assert outlined.module is not after.module
