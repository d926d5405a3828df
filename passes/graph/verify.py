"""The graph verifier: what must hold after every rewrite, and what differs where it does not."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from ...kernels.errors import VerificationError
from ..base import Program
from .nodes import call_name, fake_mode, graph_modules, is_data_dependent, results_of, value_of

__all__ = ["effects_that_differ", "verify"]


def _fail(pass_name: str, what: str) -> VerificationError:
    return VerificationError(
        f"the pass {pass_name!r} broke the graph: {what}. This is a bug in accel; turning the pass "
        f"off (options={{{pass_name!r}: False}}) avoids it"
    )


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        if len(left.shape) != len(right.shape):
            return False
        sizes = all(map(_same_size, left.shape, right.shape))
        return sizes and left.dtype == right.dtype and left.device == right.device
    return type(left) is type(right)


def _same_size(left: int | torch.SymInt, right: int | torch.SymInt) -> bool:
    if is_data_dependent(left) or is_data_dependent(right):
        return True  # every trace makes up new names for them
    return str(left) == str(right)


def _check_calls(module: fx.GraphModule, pass_name: str) -> None:
    """Branches and subgraphs get the operands that they take, and return what is read."""
    for node in module.graph.nodes:
        if node.op == "get_attr" and not _has_attribute(module, str(node.target)):
            raise _fail(pass_name, f"{node.name} refers to {node.target}, which does not exist")
        if node.op != "call_function":
            continue
        if node.target is torch.ops.higher_order.cond:
            branches, operands = node.args[1:3], node.args[3]
        elif node.target is torch.ops.higher_order.invoke_subgraph:
            branches, operands = node.args[:1], node.args[2:]
        else:
            continue
        counts = set()
        for reference in branches:
            branch = getattr(module, str(reference.target))
            taken = branch.graph.find_nodes(op="placeholder")
            if len(taken) != len(operands):
                raise _fail(
                    pass_name, f"{node.name} passes {len(operands)} operands, not {len(taken)}"
                )
            counts.add(len(results_of(branch.graph)))
            branch.graph.lint()
            _check_calls(branch, pass_name)
        if len(counts) != 1:
            raise _fail(pass_name, f"the branches of {node.name} return {counts} values")
        (count,) = counts
        for user in node.users:
            if user.target is operator.getitem and user.args[1] >= count:
                raise _fail(pass_name, f"{user.name} reads past the results of {node.name}")


def _has_attribute(module: Any, path: str) -> bool:
    for part in path.split("."):
        if not hasattr(module, part):
            return False
        module = getattr(module, part)
    return True


def verify(before: Program, after: Program, pass_name: str, deep: bool = False) -> None:
    """Raise VerificationError if a rewrite broke an invariant.

    Always: the graph is well formed; the caller's inputs and outputs are the same, in the same
    order; branches match their operands; state tensors are inputs and outputs of their own; what
    wrote, drew or acted before still does (see `effects_that_differ`).
    deep: also run the rewritten graph on fake tensors and compare the results' shapes and types.
    """
    module = after.module
    try:
        module.graph.lint()
    except RuntimeError as error:
        raise _fail(pass_name, str(error)) from error
    placeholders = module.graph.find_nodes(op="placeholder")
    expected = before.module.graph.find_nodes(op="placeholder")
    for old, new in zip(expected, placeholders, strict=False):
        if old.name != new.name:
            raise _fail(pass_name, f"input {old.name} became {new.name}")
    if len(placeholders) < len(expected):
        raise _fail(pass_name, f"{len(expected)} inputs became {len(placeholders)}")
    results, wanted = results_of(module.graph), results_of(before.module.graph)[: before.outputs]
    for old, new in zip(wanted, results, strict=False):
        if isinstance(old, fx.Node) != isinstance(new, fx.Node) or (
            isinstance(old, fx.Node) and not _same(value_of(old), value_of(new))
        ):
            raise _fail(pass_name, f"output {old} became {new}, which is not like it")
    if len(results) < len(wanted):
        raise _fail(pass_name, f"{len(wanted)} outputs became {len(results)}")
    added = [node for node in results[after.outputs :] if isinstance(node, fx.Node)]
    aliased = [node.name for node in added if node.op == "placeholder"]
    if aliased:
        raise _fail(pass_name, f"state output {aliased[0]} is an input")
    _check_calls(module, pass_name)
    different = effects_that_differ(before, after)
    if different:
        raise _fail(pass_name, "; ".join(different))
    if deep:
        _run_on_fakes(module, pass_name)


def effects_that_differ(before: Program, after: Program) -> list[str]:
    """What two stages of a program do differently beyond their results, in words.

    Compared are, by name (a rewrite keeps the names of what it keeps): calls that draw random
    numbers or act on global state; calls that write to memory of an input; and calls that write to
    memory made in the graph: such a one may only be gone together with all that shares that memory.
    What a pass has taken out on purpose (`Program.removed`) does not count.
    """
    found, removed = [], after.removed
    kinds = (("draws", lambda facts: facts.draws), ("acts", lambda facts: bool(facts.acts)))
    for what, chosen in kinds:
        old, new = (
            {
                node.name: node
                for node in each.module.graph.nodes
                if chosen(each.memory.facts_of(node))
            }
            for each in (before, after)
        )
        found += [f"{_form(old[name])} {what} and is gone" for name in old
                  if name not in new and name not in removed]  # fmt: skip
        found += [f"{_form(new[name])} {what} and is new" for name in new if name not in old]
    old, new = _writes_to_inputs(before), _writes_to_inputs(after)
    found += [f"{_form(old[name])} writes to an input and is gone" for name in old
              if name not in new and name not in removed]  # fmt: skip
    found += [f"{_form(new[name])} writes to an input and is new" for name in new
              if name not in old]  # fmt: skip
    left = {node.name for part in graph_modules(after.module) for node in part.graph.nodes}
    memory = before.memory
    for writer in memory.writers:
        if writer.name in left or writer.name in old or writer.name in removed:
            continue
        written = memory.written_by(writer)
        sharing = (node for node in before.module.graph.nodes if memory.of(node) & written)
        still = next((node for node in sharing if node.name in left), None)
        if still is not None:
            found.append(f"{_form(writer)} writes to the memory of {still.name} and is gone")
    return found


def _writes_to_inputs(program: Program) -> dict[str, fx.Node]:
    memory = program.memory
    given = {
        number
        for node in program.module.graph.nodes if node.op in ("placeholder", "get_attr")
        for number in memory.of(node)
    }  # fmt: skip
    return {node.name: node for node in memory.writers if memory.written_by(node) & given}


def _form(node: fx.Node) -> str:
    return f"{node.name} ({call_name(node)})"


def _run_on_fakes(module: fx.GraphModule, pass_name: str) -> None:
    values = [value_of(node) for node in module.graph.find_nodes(op="placeholder")]
    with fake_mode(module.graph):
        try:
            outcome = fx.Interpreter(module).run(*values)
        except Exception as error:
            raise _fail(pass_name, f"it does not run: {error}") from error
    for node, value in zip(results_of(module.graph), outcome, strict=True):
        if isinstance(node, fx.Node) and not _same(value_of(node), value):
            raise _fail(pass_name, f"{node.name} is not what it says")
