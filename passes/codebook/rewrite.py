"""The codebook pass: what depends on an id alone becomes a table with a row for each id.

A recommender looks an item up and computes on what it finds: projections, the nearest code of a
codebook and what that is decoded to (SOLID, arXiv 2408.00123), the vector of a candidate. There are
only so many items, and fewer codes. Before:

    vectors = embedding(ids, table)                   one for each id
    nearest = argmin(norms - 2 * vectors @ codes)
    decoded = linear(relu(linear(codes[nearest])))
    states = gru(decoded)

After, where the tables are functions of the model's weights alone:

    nearest = table_0[ids]                            all items' nearest codes
    gates = table_1[nearest]                          all codes, decoded and projected
    states = recurrence(gates)

The tables are computed by a graph of their own (`Tables`), again whenever a weight has changed.
The pass reads structure, not classes: lookups in the model's tensors, and operations that treat
each row alone. Where only one row of those is read, the others are not computed (see `rows`). Where
a row is multiplied by a matrix generated for it, that need not be made (see `contraction`).
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.nn.functional import embedding, linear

from ...kernels.errors import OptionError
from ...kernels.recurrence import op as recurrence
from ..base import Constants, Feature, Pass, PassResult, Program, Reason, Skip
from ..blocks import where_of
from ..graph.emit import Slot, add_input, emit
from ..graph.facts import facts_of, flops, remove_dead_code
from ..graph.nodes import ancestors, call_name, copy_module, hint, storage_of, value_of
from .contraction import Generated, contract, generated
from .lookups import Rows, analysed
from .rows import select_early
from .tables import TableModule, Work

__all__ = ["CodebookPass"]


@dataclass(frozen=True)
class CodebookPass(Pass):
    """See the module. table_bytes: that all tables together may take, and what is made on the way
    to one of them."""

    name: ClassVar[str] = "codebook"
    summary: ClassVar[str] = (
        "what depends on an id alone becomes a table: candidates' vectors, the nearest codes and "
        "what they are decoded to, gates of recurrences"
    )
    applies: ClassVar[str] = (
        "when asked for: inference graphs that compute on what they look up in the model's tensors"
    )
    keeps: ClassVar[str] = "tables, computed again when a weight changes"
    features: ClassVar[frozenset[Feature]] = frozenset({Feature.CONSTANTS, Feature.SHORT_CALLS})

    table_bytes: int = 2**28

    def __post_init__(self) -> None:
        if self.table_bytes < 1:
            raise OptionError(f"table_bytes is {self.table_bytes}; it has to be above 0")

    def run(self, program: Program) -> tuple[Program, PassResult]:
        """Fold all that can be folded within the bytes allowed."""
        if program.training:
            return program, PassResult(
                self.name, skipped=(Skip(Reason.TRAINING, "the tables would change every step"),)
            )
        effect = _effect(program)
        if effect:
            return program, PassResult(self.name, skipped=(Skip(Reason.IMPURE, effect),))
        module, _ = copy_module(program.module)
        remove_dead_code(module.graph)
        opened = _open_recurrences(module.graph)
        before = _work(module.graph)
        selected = select_early(module.graph)
        state, rows = analysed(module.graph)
        borders = [
            node
            for node, found in rows.items()
            if found.costly
            and any(rows.get(user, found).ids is not found.ids or user not in rows
                    for user in node.users)
        ]  # fmt: skip
        generations = (generated(node, state) for node in module.graph.nodes)
        products = [each for each in generations if each and each.values not in rows]
        cheaper = [each for each in products if each.is_cheaper()]
        if not borders and not cheaper:
            detail = "nothing is computed on what is looked up in the model's tensors"
            return program, PassResult(self.name, skipped=(Skip(Reason.NO_TABLES, detail),))
        sizes = [rows[node].bytes(node) for node in borders] + [each.bytes for each in cheaper]
        wanted: list[Any] = [*borders, *cheaper]
        kept, skipped, total = [], [], 0
        for each, size in zip(wanted, sizes, strict=True):
            work = Work.of(each.weight if isinstance(each, Generated) else each, rows).least
            if total + size > self.table_bytes:
                detail = f"a table of {size} bytes is more than is left of {self.table_bytes}"
            elif work > self.table_bytes:
                detail = f"computing a row of it takes {work} bytes, more than {self.table_bytes}"
            else:
                total += size
                kept.append(each)
                continue
            where = where_of(each.product if isinstance(each, Generated) else each)
            skipped.append(Skip(Reason.TOO_LARGE, detail, where))
        if not kept:
            return program, PassResult(self.name, skipped=tuple(skipped))
        lookups = [each for each in kept if not isinstance(each, Generated)]
        mixed = contract(module.graph, [each for each in kept if isinstance(each, Generated)])
        matched = (
            *(f"{where_of(node)}: {rows[node].count} rows" for node in lookups),
            *(f"{where_of(node)}: no matrix for each vector" for node in mixed),
        )
        tables, whole = _fold(module, lookups, mixed, rows, self.table_bytes)
        remove_dead_code(module.graph)
        module.recompile()
        after = _work(module.graph)
        details = {
            "tables": len(lookups) + len(mixed),
            "table bytes": total,
            "flops a call": f"{after[0]:,} instead of {before[0]:,}",
            "bytes of results a call": f"{after[1]:,} instead of {before[1]:,}",
            "recurrences opened": opened,
            "operations for one row": selected,
            "products with a whole table": whole,
            "generated matrices": f"{len(mixed)} of {len(products)} not made",
        }
        result = PassResult(self.name, matched, tuple(skipped), details)
        added = (*program.added, tables)
        return dataclasses.replace(program, module=module, added=added), result


def _effect(program: Program) -> str:
    """What in a graph makes tables unsafe: they are computed elsewhere and at another time."""
    if torch._C._is_any_autocast_enabled():
        return "autocast is on: the tables would be computed in other types"
    graph, memory = program.module.graph, program.memory
    for node in graph.nodes:
        acts = facts_of(node).acts
        if acts:
            return f"{node.name}: {acts}, which may change what is computed after it"
    for writer in memory.writers:
        written = memory.written_by(writer)
        if any(memory.of(node) & written and _is_computed_on_inputs(node) for node in graph.nodes):
            return f"{writer.name} changes in place what may share memory with an input or a weight"
    return ""


def _is_computed_on_inputs(node: fx.Node) -> bool:
    """Not so a mask, say, made from sizes alone: nothing that is looked up shares its memory."""
    return any(
        each.op == "placeholder" and isinstance(value_of(each), Tensor)
        for each in ancestors([node])
    )


def _open_recurrences(graph: fx.Graph) -> int:
    """Where a GRU reads rows of a table, give the projection of its inputs a node of its own."""
    _, rows = analysed(graph)
    opened = 0
    for node in list(graph.nodes):
        if node.target is not torch.gru or len(node.args) != 9 or node.args[0] not in rows:
            continue
        args: Any = node.args
        input, begin, weights, biases, layers, _, _, both_ways, batch_first = args
        used = [user.target is operator.getitem and user.args[1] == 0 for user in node.users]
        if not (biases and layers == 1 and not both_ways and batch_first and all(used)):
            continue
        if len({value_of(each).dtype for each in (input, begin, *weights)}) > 1:
            continue
        own_input, own_state, bias_input, bias_state = weights
        with graph.inserting_before(node):
            gates = emit(graph, linear, input, own_input, bias_input)
            state = emit(graph, operator.getitem, begin, 0)
            states = emit(graph, recurrence.OPERATOR, gates, state, own_state, bias_state)
        gates.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
        for user in list(node.users):
            user.replace_all_uses_with(states)
            graph.erase_node(user)
        graph.erase_node(node)
        opened += 1
    return opened


def _work(graph: fx.Graph) -> tuple[int, int]:
    """At the example's sizes: multiplications and additions of matrix products, and bytes of all
    that is computed, views aside."""
    made: dict[int, int] = {}
    for node in graph.nodes:
        value = value_of(node)
        if node.op in ("placeholder", "get_attr") and isinstance(value, Tensor):
            made[storage_of(value)] = 0
        elif isinstance(value, Tensor):
            size = math.prod(hint(each) for each in value.shape) * value.element_size()
            made.setdefault(storage_of(value), size)
    return sum(map(flops, graph.nodes)), sum(made.values())


def _fold(
    module: fx.GraphModule,
    kept: list[fx.Node],
    own: list[fx.Node],
    rows: dict[fx.Node, Rows],
    most: int,
) -> tuple[Constants, int]:
    """Put lookups in new inputs in the place of nodes; what computes these inputs, and how many
    products with a whole table there are now. own: nodes that new inputs take the place of, as they
    depend on the model alone. most: bytes for the work on a table."""
    graph = module.graph
    given = graph.find_nodes(op="placeholder")
    work = [Work.of(node, rows) for node in (*kept, *own)]
    read = set[fx.Node]().union(*(each.sources for each in work))
    sources = [node for node in given if node in read]
    tables = TableModule(each.module(module, sources, most) for each in work)
    products, slots = 0, []
    for number, node in enumerate(kept):
        found = rows[node]
        slots.append(_slot(number, node, (found.count, *found.tail(node))))
        table = _add_table(module, slots[-1])
        done = _multiply_at_once(node, table, found)
        products += done
        if done:
            continue
        with graph.inserting_before(node):
            looked_up = _lookup(graph, table, found)
        node.replace_all_uses_with(looked_up)
        for other, each in rows.items():
            if each.ids is node:  # a lookup by what is now looked up itself
                rows[other] = dataclasses.replace(each, ids=looked_up)
    for number, node in enumerate(own, len(kept)):
        slots.append(_slot(number, node, value_of(node).shape))
        table = _add_table(module, slots[-1])
        node.replace_all_uses_with(table)
        graph.erase_node(node)
    places = tuple(given.index(node) for node in sources)
    return Constants(tables, places, tuple(slots)), products


def _slot(number: int, like: fx.Node, shape: Sequence[int]) -> Slot:
    value = value_of(like)
    return Slot(f"table_{number}", tuple(shape), value.dtype, value.device)


def _add_table(module: fx.GraphModule, slot: Slot) -> fx.Node:
    table = add_input(module, slot)
    table.meta["accel_model_state"] = True
    return table


def _lookup(graph: fx.Graph, table: fx.Node, found: Rows) -> fx.Node:
    """The rows of a table [ids, ...], found as they were before: so that the same ids are refused,
    and negative ones count from the end or do not."""
    if not found.found:
        return emit(graph, operator.getitem, table, found.ids)
    if value_of(table).dim() == 2:
        return emit(graph, embedding, found.ids, table)
    column = emit(graph, operator.getitem, table, (slice(None), None))
    rows = emit(graph, embedding, found.ids, column)
    return emit(graph, operator.getitem, rows, (Ellipsis, 0))


def _multiply_at_once(node: fx.Node, table: fx.Node, found: Rows) -> int:
    """Where everyone's vector is multiplied by all rows of a table in their order, make that one
    product of matrices; how many there were. `node`: the rows, [B, count, size]."""
    ids: Any = found.ids
    whole = call_name(ids) == "expand" and ids.args[0].target is torch.arange
    if not whole or ids.args[0].args != (found.count,) or value_of(table).dim() != 2:
        return 0
    users = list(node.users)
    if not all(_multiplies(user, node) for user in users):
        return 0
    graph = node.graph
    for user in users:
        vector: Any = user.args[1]
        with graph.inserting_before(user):
            product = emit(graph, linear, vector.args[0], table)
            column = emit(graph, operator.getitem, product, (Ellipsis, None))
        user.replace_all_uses_with(column)
        graph.erase_node(user)
    return len(users)


def _multiplies(user: fx.Node, rows: fx.Node) -> bool:
    """Whether it is rows [B, count, size] @ vectors [B, size][..., None]."""
    if call_name(user) != "matmul" or len(user.args) != 2 or user.args[0] is not rows:
        return False
    vector: Any = user.args[1]
    if not isinstance(vector, fx.Node) or vector.target is not operator.getitem:
        return False
    inputs: Any = vector.args
    own, index = inputs
    one, other = value_of(own), value_of(rows)
    return (
        index == (Ellipsis, None)
        and one.dim() == 2
        and other.dim() == 3
        and one.dtype == other.dtype
        and str(one.shape[0]) == str(other.shape[0])
    )
