"""Reading and cutting FX graphs: values, ancestry, copies and regions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

__all__ = [
    "add_placeholder",
    "ancestors",
    "call_name",
    "copy_module",
    "descendants",
    "extract",
    "fake_mode",
    "fix_floats",
    "gather",
    "graph_modules",
    "hint",
    "insert_call",
    "is_data_dependent",
    "is_model_state",
    "is_module_reference",
    "live_ins",
    "live_outs",
    "mark_inputs",
    "module_path",
    "operands_of",
    "results_of",
    "settle",
    "storage_of",
    "submodule_name",
    "value_of",
]


def value_of(node: fx.Node) -> Any:
    """The fake value that Dynamo (or a pass) recorded for a node; None where there is none."""
    return node.meta.get("example_value")


def module_path(raw: str) -> str:
    """A readable module path from Dynamo's source expression.

    >>> module_path("L['self'].__dict__['_modules']['blocks'].0.norm")
    'blocks.0.norm'
    """
    for noise in (".__dict__['_modules']", "._modules"):
        raw = raw.replace(noise, "")
    raw = raw.removeprefix("L['self']").removeprefix("L['fn']")
    return raw.replace("['", ".").replace("']", "").replace("[", ".").replace("]", "").strip(".")


def mark_inputs(graph: fx.Graph) -> None:
    """Note on every placeholder whether the caller or the model supplies it.

    Dynamo says where a value comes from in an attribute that copies of a graph lose; the note they
    keep, and it stands.
    """
    for node in graph.find_nodes(op="placeholder"):
        if "accel_model_state" in node.meta:
            continue
        source = getattr(node, "_dynamo_source", None)
        name = "" if source is None else str(source.name)
        root: Any = source
        while getattr(root, "base", None) is not None:
            root = root.base
        from_model = (
            isinstance(value_of(node), torch.nn.Parameter)
            or getattr(root, "local_name", None) == "self"
            or any(part in name for part in ("_modules", "_parameters", "_buffers"))
        )
        node.meta["accel_model_state"] = from_model


def is_model_state(node: fx.Node) -> bool:
    """Whether a node is a parameter, a buffer or another tensor that the model owns."""
    return node.op == "get_attr" or bool(node.meta.get("accel_model_state"))


def call_name(node: fx.Node) -> str:
    """The plain name of what a node calls, whether function or method."""
    target = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def descendants(roots: Iterable[fx.Node]) -> set[fx.Node]:
    """All nodes that depend on `roots`, these included."""
    found, todo = set(), list(roots)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(node.users)
    return found


def ancestors(roots: Iterable[fx.Node]) -> set[fx.Node]:
    """All nodes that `roots` depend on, these included."""
    found, todo = set(), list(roots)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(node.all_input_nodes)
    return found


def is_module_reference(node: fx.Node) -> bool:
    """Whether a node names a subgraph (a mask function of flex attention, say), not a value."""
    owner = node.graph.owning_module
    return node.op == "get_attr" and isinstance(
        getattr(owner, str(node.target), None), torch.nn.Module
    )


def live_ins(region: Sequence[fx.Node]) -> list[fx.Node]:
    """Values that a region (in graph order) reads from outside, in order of first use."""
    inside = set(region)
    found: dict[fx.Node, None] = {}
    for node in region:
        for source in node.all_input_nodes:
            if source not in inside and not is_module_reference(source):
                found.setdefault(source)
    return list(found)


def operands_of(region: Sequence[fx.Node]) -> list[fx.Node]:
    """What a region needs to stand alone: its live-ins, and the symbols that its sizes are made of.

    Inductor reads a symbol off an operand of that size; where sizes are only products of symbols
    (tokens of an image of any height and width) it has to be handed the factors too.
    """
    found = live_ins(region)
    mentioned: set[Any] = set()
    for node in [*found, *region]:
        value = value_of(node)
        sizes = (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else (value,)
        for size in sizes:
            if isinstance(size, torch.SymInt):
                mentioned |= size.node.expr.free_symbols
    symbols = {_symbol(node): node for node in found}
    for node in region[0].graph.find_nodes(op="placeholder"):
        if _symbol(node) in mentioned and _symbol(node) not in symbols:
            symbols[_symbol(node)] = node
            found.append(node)
    return found


def _symbol(node: fx.Node) -> Any:
    value = value_of(node)
    return value.node.expr if isinstance(value, torch.SymInt) else None


def live_outs(region: Sequence[fx.Node]) -> list[fx.Node]:
    """Values of a region that are read outside, in graph order."""
    inside = set(region)
    return [node for node in region if any(user not in inside for user in node.users)]


def results_of(graph: fx.Graph) -> tuple[Any, ...]:
    """What a graph returns, as a tuple of nodes (and constants, where it returns such)."""
    (results,) = graph.output_node().args
    return tuple(results) if isinstance(results, (tuple, list)) else (results,)


def copy_module(module: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A new GraphModule with a copy of the graph (the parameters are shared) and the node map.

    Dynamo keeps using the graph that it handed over, so passes never edit that one.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(module.graph, mapping)
    old_output = module.graph.output_node()
    mapping[old_output] = graph.output(result)
    mapping[old_output].meta = copy.copy(old_output.meta)
    return fx.GraphModule(module, graph), mapping


def add_placeholder(module: fx.GraphModule, name: str, value: Any) -> fx.Node:
    """A new last input. `value` is a fake tensor of the graph's own fake mode."""
    last = module.graph.find_nodes(op="placeholder")[-1]
    with module.graph.inserting_after(last):
        node = module.graph.placeholder(name)
    node.meta["example_value"] = value
    return node


def graph_modules(module: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """A graph module and the branches that its graph refers to."""
    yield module
    for node in module.graph.find_nodes(op="get_attr"):
        child = getattr(module, str(node.target), None)
        if isinstance(child, fx.GraphModule):
            yield from graph_modules(child)


def submodule_name(modules: Sequence[torch.nn.Module], prefix: str) -> str:
    """A name starting with `prefix` that none of the modules uses yet."""
    index = 0
    while any(hasattr(module, f"{prefix}_{index}") for module in modules):
        index += 1
    return f"{prefix}_{index}"


def extract(
    owner: fx.GraphModule,
    region: Sequence[fx.Node],
    operands: Sequence[fx.Node],
    finish: Callable[[fx.Graph, dict[fx.Node, fx.Node]], Sequence[fx.Node]],
) -> fx.GraphModule:
    """A module that computes `region` from `operands`.

    `finish(graph, mapping)` may append nodes and returns the results. Tensors and submodules that
    the region refers to by name are shared with `owner`.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for operand in operands:
        mapping[operand] = graph.placeholder(operand.name)
        mapping[operand].meta["example_value"] = value_of(operand)
    for node in region:
        for source in node.all_input_nodes:
            if source not in mapping and is_module_reference(source):
                mapping[source] = graph.node_copy(source)
        mapping[node] = graph.node_copy(node, lambda old: mapping[old])
    results = finish(graph, mapping)
    graph.output(tuple(results))
    module = fx.GraphModule(owner, graph)
    graph.lint()
    return module


def gather(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    """Reorder `graph` so that a region stands together, after all that it reads.

    Nodes between its first and last member that depend on it move behind it.
    """
    inside = set(nodes)
    after: list[fx.Node] = []
    moved: set[fx.Node] = set()
    started = False
    for node in list(graph.nodes):
        if node is nodes[0]:
            started = True
        if node is nodes[-1]:
            break
        if started and node not in inside:
            depends = any(source in inside or source in moved for source in node.all_input_nodes)
            if depends:
                moved.add(node)
                after.append(node)
            else:
                nodes[0].prepend(node)
    anchor = nodes[-1]
    for node in after:
        anchor.append(node)
        anchor = node


def storage_of(value: torch.Tensor) -> int:
    """The same number for fake values that share memory."""
    return int(value.untyped_storage()._cdata)


def settle(
    graph: fx.Graph,
    region: Sequence[fx.Node],
    operands: Sequence[fx.Node],
    others: Sequence[fx.Node] = (),
) -> dict[fx.Node, fx.Node]:
    """Copy operands of a region into plain layout, in front of it; the copies by operand.

    One in plain layout stays the same tensor, unless it shares memory with one before it or with
    one of `others`.
    """
    settled = {}
    storages = {storage_of(value_of(node)) for node in others}
    for operand in operands:
        value = value_of(operand)
        plain: dict[str, Any] = {"memory_format": torch.contiguous_format}
        with graph.inserting_before(region[0]), value.fake_mode:
            copy = value.contiguous()
            if storage_of(copy) in storages:
                copy = value.clone(**plain)
                settled[operand] = graph.call_method("clone", (operand,), plain)
            else:
                settled[operand] = graph.call_method("contiguous", (operand,))
        settled[operand].meta["example_value"] = copy
        storages.add(storage_of(copy))
        for node in region:
            node.replace_input_with(operand, settled[operand])
    return settled


def fix_floats(graph: fx.Graph, nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Make numbers that Dynamo left free into constants, with a guard; the nodes that remain.

    With `dynamic=True` the attributes of a model (an epsilon, an attention scale) are such numbers.
    Plain graphs may compute with them, but a branch or a shared subgraph can't be traced with one.
    """
    remaining = []
    for node in nodes:
        value = value_of(node)
        if isinstance(value, torch.SymFloat):
            number = float(value)  # torch notes what this relied on
            for user in list(node.users):
                user.args = _with_number(user.args, node, number)
                user.kwargs = _with_number(user.kwargs, node, number)
            if node.op != "placeholder":
                graph.erase_node(node)
        else:
            remaining.append(node)
    return remaining


def _with_number(arguments: Any, node: fx.Node, number: float) -> Any:
    return fx.node.map_arg(arguments, lambda each: number if each is node else each)


def fake_mode(graph: fx.Graph) -> Any:
    """The fake mode that a captured graph's values live in."""
    for node in graph.nodes:
        mode = getattr(value_of(node), "fake_mode", None)
        if mode is not None:
            return mode
    raise ValueError("the graph carries no fake tensors: it was not captured by Dynamo")


def insert_call(graph: fx.Graph, function: Callable[..., Any], *args: Any) -> fx.Node:
    """A new node at the point of insertion, with its value. To be called under `fake_mode`."""
    node = graph.call_function(function, args)
    values = [value_of(each) if isinstance(each, fx.Node) else each for each in args]
    node.meta["example_value"] = function(*values)
    return node


def is_data_dependent(size: Any) -> bool:
    """Whether a size is known only once the data are (an unbacked symbol)."""
    return isinstance(size, torch.SymInt) and not size.node.has_hint()


def hint(size: int | torch.SymInt) -> int:
    """A size as a number, for estimates: a symbolic one at the value that it was captured with.

    A size that depends on data has none; it counts as 1.
    """
    if isinstance(size, int):
        return size
    return 1 if is_data_dependent(size) else int(size.node.hint)
