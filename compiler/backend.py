"""The backend that `torch.compile(model, backend="accel")` finds by its entry point."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ..kernels.errors import AccelError
from ..kernels.omnisparse.op import each_selection
from ..kernels.omnisparse.selection import Selection
from ..passes import Added, Constants, PadePass, PassResult, Program, StackState
from ..passes.graph.nodes import is_model_state, value_of
from .lowering.table import CANNOT, check_lowering, lower
from .options import Options, parse_options
from .pipeline import rewrite
from .runtime.sampling import PadeGraph
from .runtime.tables import TableGraph

__all__ = ["CompiledGraph", "accel_backend", "compiled_graphs", "forget_graphs", "is_whole"]

_numbers = itertools.count()
_compiled: weakref.WeakSet[CompiledGraph] = weakref.WeakSet()


class CompiledGraph:
    """One graph as Dynamo calls it, with the record of how it came about.

    owners: parameters of the models that have run through it, by which `stats` finds it.
    part: whether Dynamo captured more beside it, before or after what it could not.
    selections: budget, recall and need of each sparse attention in its last call that had any.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        calls: int,
        results: tuple[PassResult, ...],
        options: Options,
        owner_index: int | None,
        part: bool,
    ) -> None:
        self.number = next(_numbers)
        # Graphs of one frame are recompilations of each other; other frames are graph breaks.
        compile_id = torch._guards.CompileContext.current_compile_id()
        self.frame = compile_id.frame_id if compile_id is not None else -self.number - 1
        self.part = part
        self.calls = calls
        self.options = options
        self.call = call
        self.results = results
        self.owner_index = owner_index
        self.sparse = any(each.name == "omnisparse" and each.matched for each in results)
        self.selections: list[tuple[torch.Tensor, ...]] = []
        self.owners: weakref.WeakValueDictionary[int, torch.Tensor] = weakref.WeakValueDictionary()
        _compiled.add(self)

    def __call__(self, *inputs: Any) -> Any:
        if self.owner_index is not None:
            owner = inputs[self.owner_index]
            self.owners[id(owner)] = owner
        if not self.sparse:
            return self.call(*inputs)
        seen: list[tuple[torch.Tensor, ...]] = []

        def see(selection: Selection) -> None:
            # Without the keys, which are many; what they come to is computed when it is asked for.
            seen.append(tuple(each.clone() for each in selection[1:]))

        with each_selection(see):
            result = self.call(*inputs)
        if seen:  # a predicted step has none
            self.selections = seen
        return result


def accel_backend(
    module: fx.GraphModule,
    example_inputs: list[Any],
    *,
    options: Options | Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> CompiledGraph:
    """Compile one captured graph: validate options, run the passes, lower.

    Called by `torch.compile`. options: see `Options`; mode: as for the Inductor backend.
    Raises OptionError before anything is compiled.
    """
    parsed = parse_options(options)
    program, results = rewrite(module, parsed, CANNOT.get(parsed.lowering))
    check_lowering(parsed.lowering, program.training)
    config = torch._inductor.list_mode_options(mode) if mode and mode != "default" else None
    function = lower(program, example_inputs, parsed.lowering, config)
    placeholders = module.graph.find_nodes(op="placeholder")
    owned = [
        index for index, node in enumerate(placeholders)
        if is_model_state(node) and isinstance(value_of(node), torch.Tensor)
    ]  # fmt: skip
    # Rather a parameter: with dynamic=True, numbers of the model come as tensors made for the call.
    lasting = [i for i in owned if isinstance(value_of(placeholders[i]), torch.nn.Parameter)]
    owner = next(iter([*lasting, *owned]), None)
    # What was added last is handed over last.
    for added in reversed(program.added):
        function = _filled(function, added, program, parsed, lasting or owned[:1])
    calls = sum(node.op.startswith("call") for node in module.graph.nodes)
    return CompiledGraph(function, calls, results, parsed, owner, _is_part(module))


def _is_part(module: fx.GraphModule) -> bool:
    """Whether a graph ends or begins where Dynamo had to stop."""
    from torch._dynamo.resume_execution import TORCH_DYNAMO_RESUME_IN_PREFIX

    end = getattr(module, "compile_subgraph_reason", None)
    if end is None:  # captured by another
        return False
    resumed = any(each.name.startswith(TORCH_DYNAMO_RESUME_IN_PREFIX) for each in end.user_stack)
    return bool(end.graph_break) or resumed


def _filled(
    function: Callable[..., Any],
    added: Added,
    program: Program,
    options: Options,
    owned: Sequence[int],
) -> Callable[..., Any]:
    """A function that fills in what a pass has added, for whoever calls it without."""
    if isinstance(added, Constants):
        return TableGraph(function, added)
    if isinstance(added, StackState):
        pade = options.of(PadePass)
        assert pade is not None
        placeholders = program.module.graph.find_nodes(op="placeholder")
        symbols = {
            str(value_of(node)): (index, None)
            for index, node in enumerate(placeholders)
            if isinstance(value_of(node), torch.SymInt)
        }
        return PadeGraph(function, symbols, program.outputs, added, pade, owned)
    raise AccelError(f"nothing is known that fills in {type(added).__name__}")


def compiled_graphs(parameters: frozenset[int]) -> list[CompiledGraph]:
    """The graphs that a model has run through, by its parameters' ids."""
    return [graph for graph in list(_compiled) if any(p in graph.owners for p in parameters)]


def is_whole(graphs: Sequence[CompiledGraph]) -> bool:
    """Whether Dynamo captured a model as one graph: these are that one, and it compiled again."""
    return len({graph.frame for graph in graphs}) == 1 and not any(each.part for each in graphs)


def forget_graphs(parameters: frozenset[int]) -> None:
    """Let a model's graphs be found no more, as it runs through others from now on."""
    for graph in compiled_graphs(parameters):
        for each in parameters:
            graph.owners.pop(each, None)
