"""Reading FX graphs: values, ancestry, copies."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

__all__ = [
    "ancestors",
    "call_name",
    "copy_module",
    "descendants",
    "fake_mode",
    "graph_modules",
    "hint",
    "is_data_dependent",
    "is_model_state",
    "is_module_reference",
    "mark_inputs",
    "module_path",
    "results_of",
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
    return _reached(roots, lambda node: node.users)


def ancestors(roots: Iterable[fx.Node]) -> set[fx.Node]:
    """All nodes that `roots` depend on, these included."""
    return _reached(roots, lambda node: node.all_input_nodes)


def _reached(
    roots: Iterable[fx.Node], neighbours: Callable[[fx.Node], Iterable[fx.Node]]
) -> set[fx.Node]:
    found, todo = set(), list(roots)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(neighbours(node))
    return found


def is_module_reference(node: fx.Node) -> bool:
    """Whether a node names a subgraph (a mask function of flex attention, say), not a value."""
    owner = node.graph.owning_module
    return node.op == "get_attr" and isinstance(
        getattr(owner, str(node.target), None), torch.nn.Module
    )


def results_of(graph: fx.Graph) -> tuple[Any, ...]:
    """What a graph returns, as a tuple of nodes (and constants, where it returns such)."""
    (results,) = graph.output_node().args
    return tuple(results) if isinstance(results, (tuple, list)) else (results,)


def copy_module(module: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A new GraphModule with a copy of the graph and of its subgraphs, and the node map.

    Tensors are shared. Dynamo keeps using the graph that it handed over, and a pass that fails must
    leave the graph before it whole, so passes never edit one that they were given.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(module.graph, mapping)
    old_output = module.graph.output_node()
    mapping[old_output] = graph.output(result)
    mapping[old_output].meta = copy.copy(old_output.meta)
    copied = fx.GraphModule(module, graph)
    for name in _subgraphs(module):
        child = getattr(copied, name)
        inner, _ = copy_module(child)
        inner.meta.update(child.meta)
        setattr(copied, name, inner)
    return copied, mapping


def _subgraphs(module: fx.GraphModule) -> list[str]:
    """The names by which a graph refers to others."""
    names = dict.fromkeys(str(node.target) for node in module.graph.find_nodes(op="get_attr"))
    return [name for name in names if isinstance(getattr(module, name, None), fx.GraphModule)]


def graph_modules(module: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """A graph module and those that its graph refers to, each once."""
    yield module
    for name in _subgraphs(module):
        yield from graph_modules(getattr(module, name))


def submodule_name(modules: Sequence[torch.nn.Module], prefix: str) -> str:
    """A name starting with `prefix` that none of the modules uses yet."""
    index = 0
    while any(hasattr(module, f"{prefix}_{index}") for module in modules):
        index += 1
    return f"{prefix}_{index}"


def storage_of(value: torch.Tensor) -> int:
    """The same number for fake values that share memory."""
    return int(value.untyped_storage()._cdata)


def fake_mode(graph: fx.Graph) -> Any:
    """The fake mode that a captured graph's values live in."""
    for node in graph.nodes:
        mode = getattr(value_of(node), "fake_mode", None)
        if mode is not None:
            return mode
    raise ValueError("the graph carries no fake tensors: it was not captured by Dynamo")


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
