"""Reading and cutting FX graphs: values, ancestry, copies and regions."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

__all__ = [
    "VIEWS",
    "add_placeholder",
    "ancestors",
    "call_name",
    "copy_module",
    "descendants",
    "extract",
    "fake_mode",
    "gather",
    "hint",
    "inline",
    "is_data_dependent",
    "is_model_state",
    "is_module_reference",
    "is_pure",
    "live_ins",
    "live_outs",
    "mark_inputs",
    "module_path",
    "mutated",
    "settle",
    "storage_root",
    "submodule_name",
    "unsafe_effect",
    "value_of",
]

_IMPURE_FUNCTIONS = {
    torch._C._set_grad_enabled,
    torch._assert,
    torch._assert_async,
    operator.delitem,
}
_RANDOM = {
    "rand", "randn", "rand_like", "randn_like", "randint", "bernoulli", "multinomial", "normal",
    "randperm",
}  # fmt: skip
IN_PLACE_OPERATORS = frozenset(
    {"iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "iand", "ior", "ixor", "imatmul"}
)
IN_PLACE_METHODS = IN_PLACE_OPERATORS | {"add_", "mul_", "sub_", "div_", "copy_", "fill_", "zero_",
                                         "cumsum_", "clamp_", "relu_", "silu_"}  # fmt: skip


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

    Dynamo says where a value comes from in an attribute that copies of a graph lose.
    """
    for node in graph.find_nodes(op="placeholder"):
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


def is_pure(node: fx.Node) -> bool:
    """Whether a node only computes its result (no randomness, mutation or global effect)."""
    if node.op in ("placeholder", "get_attr", "output"):
        return True
    if node.op not in ("call_function", "call_method"):
        return False
    name = call_name(node)
    if node.target in _IMPURE_FUNCTIONS or name in _RANDOM:
        return False
    if "autocast" in name or "vmap" in name or "batch_dim" in name:
        return False  # they open and close a scope
    return mutated(node) is None


# Calls whose result may share memory with their first input.
VIEWS = frozenset({
    "view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "expand", "getitem", "chunk",
    "split", "unbind", "flatten", "unflatten", "contiguous", "to", "float", "type_as", "detach",
    "narrow", "select", "view_as", "expand_as", "movedim", "t", "T", "real", "imag", "getattr",
    "split_with_sizes", "tensor_split", "dropout", "identity", "alias", "swapaxes", "half",
    "bfloat16", "double", "view_as_real", "view_as_complex", "moveaxis", "swapdims", "mT",
})  # fmt: skip


def call_name(node: fx.Node) -> str:
    """The plain name of what a node calls, whether function or method."""
    target = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def storage_root(node: fx.Node) -> fx.Node:
    """The node whose memory `node` may be a view of (itself, where it is no view)."""
    while node.op.startswith("call") and call_name(node) in VIEWS | IN_PLACE_METHODS:
        if not node.all_input_nodes:
            break
        node = node.all_input_nodes[0]
    return node


def mutated(node: fx.Node) -> fx.Node | None:
    """The tensor that a node changes in place; None where it changes nothing."""
    if node.op not in ("call_function", "call_method") or not node.all_input_nodes:
        return None
    name = call_name(node)
    in_place = name == "setitem" or (
        isinstance(value_of(node.all_input_nodes[0]), torch.Tensor)
        and (
            name in IN_PLACE_METHODS
            or (node.op == "call_method" and name.endswith("_") and not name.endswith("__"))
            or (
                node.op == "call_function"
                and name.endswith("_")
                and not name.startswith("_")
                and getattr(operator, name, None) is not node.target
            )
            or (name in IN_PLACE_OPERATORS and getattr(operator, name) is node.target)
            or node.kwargs.get("inplace") is True
        )
    )
    if in_place:
        return node.all_input_nodes[0]
    out = node.kwargs.get("out")
    return out if isinstance(out, fx.Node) else None


def unsafe_effect(region: Sequence[fx.Node], graph: fx.Graph) -> fx.Node | None:
    """A node because of which a region can't be cut out, if there is one.

    That is: randomness or a global effect inside; a change in place of anything that the region
    did not make itself; and a change, outside, of anything that it reads.
    """
    inside = set(region)
    for node in region:
        target = mutated(node)
        if target is None and not is_pure(node):
            return node
        if target is not None and storage_root(target) not in inside:
            return node
    order = {node: position for position, node in enumerate(graph.nodes)}
    readers: dict[fx.Node, int] = {}
    for node in region:
        for source in node.all_input_nodes:
            root = storage_root(source)
            readers[root] = min(order[node], readers.get(root, order[node]))
    dependent = descendants(region)
    for node in graph.nodes:
        target = None if node in inside else mutated(node)
        if target is None or not order[region[0]] < order[node] < order[region[-1]]:
            continue
        # `gather` moves it before the region, or behind it where it depends on the region.
        root = storage_root(target)
        if root in readers and (node in dependent or readers[root] < order[node]):
            return node
    return None


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


def live_outs(region: Sequence[fx.Node]) -> list[fx.Node]:
    """Values of a region that are read outside, in graph order."""
    inside = set(region)
    return [node for node in region if any(user not in inside for user in node.users)]


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


def submodule_name(module: torch.nn.Module, prefix: str) -> str:
    """A name starting with `prefix` that the module does not use yet."""
    index = 0
    while hasattr(module, f"{prefix}_{index}"):
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


def settle(
    graph: fx.Graph, region: Sequence[fx.Node], operands: Sequence[fx.Node]
) -> dict[fx.Node, fx.Node]:
    """Copy operands of a region into plain layout, in front of it; the copies by operand."""
    settled = {}
    for operand in operands:
        value = value_of(operand)
        with graph.inserting_before(region[0]), value.fake_mode:
            settled[operand] = graph.call_method("contiguous", (operand,))
            settled[operand].meta["example_value"] = value.contiguous()
        for node in region:
            node.replace_input_with(operand, settled[operand])
    return settled


class _Recorder(TorchFunctionMode):
    """Runs torch calls on fake tensors and writes each one down as a node."""

    def __init__(self, graph: fx.Graph, nodes: dict[int, fx.Node]) -> None:
        super().__init__()
        self.graph = graph
        self.nodes = nodes
        self.alive: list[Any] = []  # ids are only unique among living tensors

    def _note(self, value: torch.Tensor, node: fx.Node) -> None:
        node.meta["example_value"] = value
        self.nodes[id(value)] = node
        self.alive.append(value)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, torch.Tensor) or id(result) in self.nodes:
            return result  # sizes and the like are constants; the same tensor needs no node

        def known(value: Any) -> Any:
            return self.nodes[id(value)] if isinstance(value, torch.Tensor) else value

        arguments = tree_map(known, args), tree_map(known, kwargs or {})
        name = getattr(func, "__name__", "")
        if getattr(torch.Tensor, name, None) is func:
            node = self.graph.call_method(name, *arguments)
        else:
            node = self.graph.call_function(func, *arguments)
        self._note(result, node)
        return result


def inline(
    graph: fx.Graph, function: Callable[..., Any], arguments: Sequence[fx.Node]
) -> list[fx.Node]:
    """Append the body of a plain torch function of tensors to a graph; its results as nodes.

    The function runs once on the arguments' fake values, so it may ask for dimensions; it must
    not branch on values. The new nodes carry fake values of their own.
    """
    values = [value_of(node) for node in arguments]
    # The same tensor may be given twice (a blank history); views keep the arguments apart.
    values = [value.view_as(value) for value in values]
    nodes = {id(value): node for value, node in zip(values, arguments, strict=True)}
    with values[0].fake_mode, _Recorder(graph, nodes) as recorder:
        results = function(*values)
        listed = list(results) if isinstance(results, (tuple, list)) else [results]
    return [recorder.nodes[id(value)] for value in listed]


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
