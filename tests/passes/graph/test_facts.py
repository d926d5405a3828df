"""Facts against what really happens, for all of torch's operators, not those one thought of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice, product
from typing import Any

import pytest
import torch
from accel.passes.graph.facts import Facts, Memory, facts_of, is_impure, remove_dead_code
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

OPERATORS = sorted({f"{op.name}.{op.variant_test_name}": op for op in op_db}.items())


def node_of(function: Callable[..., Any], args: Any, kwargs: Any) -> fx.Node:
    """A graph of one call, with fake values, as Dynamo would capture it."""
    graph, mode = fx.Graph(), FakeTensorMode(allow_non_fake_inputs=True)
    leaves, form = tree_flatten((args, kwargs))
    values = [mode.from_tensor(each) if isinstance(each, Tensor) else each for each in leaves]
    nodes = []
    for number, value in enumerate(values):
        if isinstance(value, Tensor):
            nodes.append(graph.placeholder(f"given_{number}"))
            nodes[-1].meta["example_value"] = value
        else:
            nodes.append(value)
    node = graph.call_function(function, *tree_unflatten(nodes, form))
    copies = [value.clone() if isinstance(value, Tensor) else value for value in values]
    with mode, torch.no_grad():
        fake_args, fake_kwargs = tree_unflatten(copies, form)
        node.meta["example_value"] = function(*fake_args, **fake_kwargs)
    graph.output(node)
    return node


def tensors(value: Any) -> list[Tensor]:
    return [each for each in tree_leaves(value) if isinstance(each, Tensor)]


def shared(left: Tensor, right: Tensor) -> bool:
    one, other = left.untyped_storage(), right.untyped_storage()
    return one.nbytes() > 0 and one.data_ptr() == other.data_ptr()


def bits(tensor: Tensor) -> Tensor:
    return tensor.resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8)


def disagreement(facts: Facts, function: Callable[..., Any], args: Any, kwargs: Any) -> str:
    """What a real call does that the facts do not say."""
    if facts.acts:
        return ""  # taken to do everything
    args, kwargs = tree_map(
        lambda each: each.clone() if isinstance(each, Tensor) else each, (args, kwargs)
    )
    given = tensors((args, kwargs))
    before = [(each._version, each.clone()) for each in given]
    state = torch.get_rng_state()
    with torch.no_grad():
        result = function(*args, **kwargs)
    if not torch.equal(state, torch.get_rng_state()) and not facts.draws:
        return "it draws"
    for index, (each, (version, value)) in enumerate(zip(given, before, strict=True)):
        same = each.shape == value.shape and torch.equal(bits(each), bits(value))
        if (each._version != version or not same) and index not in facts.writes:
            return f"it writes to operand {index}"
    for number, each in enumerate(tensors(result)):
        for index, operand in enumerate(given):
            if shared(each, operand) and (number, index) not in facts.shares:
                return f"result {number} shares the memory of operand {index}"
    return ""


def forms(op: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The ways in which an operator can be called."""
    for name in ("op", "method_variant", "inplace_variant"):
        function = getattr(op, name, None)
        if callable(function):
            yield name, function


@pytest.mark.filterwarnings("ignore")
def test_facts_of_all_of_torchs_operators() -> None:
    """With two samples of inputs each, as a function, as a method and in place."""
    wrong, understood, calls = [], 0, 0
    for name, op in OPERATORS:
        dtype = torch.float32 if torch.float32 in op.dtypes else next(iter(op.dtypes), None)
        try:
            samples = list(islice(op.sample_inputs("cpu", dtype, requires_grad=False), 2))
        except Exception:  # a sample that needs a device or a library
            continue
        for sample, (form, function) in product(samples, forms(op)):
            args, kwargs = (sample.input, *sample.args), sample.kwargs
            copied = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))
            try:  # some have no in-place form for this sample, some no fake kernel
                with torch.no_grad():
                    function(*copied[0], **copied[1])
                node = node_of(function, args, kwargs)
            except Exception:
                continue
            calls += 1
            facts = facts_of(node)
            understood += not facts.acts
            problem = disagreement(facts, function, args, kwargs)
            if problem:
                wrong.append(f"{name} ({form}): {problem}")
    assert not wrong, "\n".join(wrong)
    assert calls > 1500
    assert understood > 0.97 * calls


@pytest.mark.parametrize(
    ("draw", "draws"),
    [
        (lambda x: functional.dropout(x, 0.5, True), True),
        (lambda x: functional.dropout(x, 0.5, False), False),
        (lambda x: functional.rrelu(x, training=True), True),
        (lambda x: functional.rrelu(x, training=False), False),
        (lambda x: x.clone().exponential_(), True),
        (lambda x: torch.rand(3), True),
        (lambda x: functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5), True),
        (lambda x: functional.scaled_dot_product_attention(x, x, x), False),
        (functional.gumbel_softmax, True),
    ],
)
def test_what_draws(draw: Callable[..., Any], draws: bool) -> None:
    given = torch.randn(1, 2, 4, 8)
    facts = facts_of(node_of(draw, (given,), {}))
    assert facts.draws is draws
    assert not disagreement(facts, draw, (given,), {})


def test_a_normalisation_in_training_writes_its_statistics() -> None:
    def normalised(x: Tensor, mean: Tensor, variance: Tensor, training: bool) -> Tensor:
        return functional.batch_norm(x, mean, variance, training=training)

    given = torch.randn(4, 3), torch.zeros(3), torch.ones(3)
    assert facts_of(node_of(normalised, (*given, True), {})).writes == {1, 2}
    assert facts_of(node_of(normalised, (*given, False), {})).pure


@pytest.mark.parametrize(
    "function",
    [
        torch._C._set_grad_enabled,
        lambda enabled: torch.set_grad_enabled(enabled),
        lambda enabled: torch.amp.autocast_mode._enter_autocast("cpu", None, enabled, None),
    ],
)
def test_what_changes_global_state_acts(function: Callable[..., Any]) -> None:
    graph = fx.Graph()
    given = graph.placeholder("given")
    with FakeTensorMode():
        given.meta["example_value"] = torch.randn(2)
    node = graph.call_function(function, (False,))
    graph.output((given, node))
    before = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
    assert facts_of(node).acts
    assert before == (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))


def captured(function: Callable[..., Any], *args: Any) -> fx.Graph:
    graphs = []

    def collect(module: fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(module.graph)
        return module.forward

    with torch.no_grad():
        torch.compile(function, backend=collect, fullgraph=True)(*args)
    return graphs[0]


def test_dead_code_is_what_nobody_reads_and_what_does_nothing() -> None:
    def function(x: Tensor) -> Tensor:
        mask = torch.ones(3)
        mask.mul_(2.0)  # a statement
        functional.dropout(x, 0.5, True)  # moves the generator
        x.sin()
        x.ravel()[:1].zero_()
        return x * mask

    graph = captured(function, torch.randn(3))
    names = {node.name for node in graph.nodes}
    remove_dead_code(graph)
    gone = names - {node.name for node in graph.nodes}
    assert gone == {"sin"}
    assert all(is_impure(node) or node.users for node in graph.nodes)


def test_memory_is_followed_through_views_and_pieces() -> None:
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        left, right = x.chunk(2, -1)
        turned = left.mT.unsqueeze(0)
        turned.add_(1)
        fresh = right.contiguous().mul(2)
        fresh.mul_(y)
        return left, fresh

    graph = captured(function, torch.randn(4, 4), torch.randn(4, 2))
    memory = Memory(graph)
    by_name = {node.name: node for node in graph.nodes}
    x, y = by_name["l_x_"], by_name["l_y_"]
    first, second = list(memory.writers)
    assert memory.written_by(first) == memory.of(x)
    assert memory.written_by(second).isdisjoint(memory.of(x) | memory.of(y))


def test_costs_are_those_of_the_matrix_products() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    graph = captured(lambda x: model.linear2(model.linear1(x)), torch.randn(2, 5, 16))
    assert sum(facts_of(node).flops for node in graph.nodes) == 2 * (2 * 2 * 5 * 16 * 32)
    attention = node_of(
        functional.scaled_dot_product_attention, tuple(torch.randn(3, 2, 4, 7, 8)), {}
    )
    assert facts_of(attention).flops == 4 * 2 * 4 * 7 * 7 * 8


def test_what_acts_is_not_taken_to_write_where_it_is_understood() -> None:
    def function(x: Tensor) -> Tensor:
        torch._assert_async((x > 0).any())
        return x.sin()

    graph = captured(function, torch.rand(3))
    memory = Memory(graph)
    (acting,) = [node for node in graph.nodes if memory.facts_of(node).acts]
    assert not memory.facts_of(acting).opaque
    assert not list(memory.writers)
    assert is_impure(acting)


def test_what_is_not_understood_may_write_to_all_that_it_is_given() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    with FakeTensorMode():
        x.meta["example_value"], y.meta["example_value"] = torch.rand(3), torch.rand(3)
        node = graph.call_function(lambda a: a.no_such_method(), (x,))
        node.meta["example_value"] = torch.rand(3)
    graph.output((node, y))
    memory = Memory(graph)
    assert memory.written_by(node) == memory.of(x)
    assert memory.of(node) == memory.of(x)
    assert memory.of(node).isdisjoint(memory.of(y))


def test_a_number_out_of_a_tensor_is_no_effect() -> None:
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        graph = captured(lambda x, number: x * number.item(), torch.rand(3), torch.tensor(2.5))
    assert "item" in {node.target for node in graph.nodes}
    assert all(facts_of(node).pure for node in graph.nodes)
