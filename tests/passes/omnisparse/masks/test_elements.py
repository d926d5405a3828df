"""Whatever is said of a mask is so, for sizes and tables that were not there when it was said."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accel.passes.omnisparse.masks.cases import If, Value
from accel.passes.omnisparse.masks.read import SMALL, Mask, read_mask
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

KNOWN = ("causal", "full")
LENGTHS = (7, 13, 90)
LOWEST = torch.finfo(torch.float32).min


class Reader:
    """A back end that reads the mask that a graph returns, and compares each to what it read."""

    def __init__(self) -> None:
        self.found: list[Mask] = []

    def __call__(self, module: fx.GraphModule, _: Any) -> Callable[..., Any]:
        (mask,) = module.graph.output_node().args[0]
        batch, heads, queries, keys = mask.meta["example_value"].shape
        found = read_mask(mask, (batch, heads, queries, keys))
        self.found.append(found)

        def run(*inputs: Any) -> Any:
            interpreter = fx.Interpreter(module, garbage_collect_values=False)
            (result,) = interpreter.run(*inputs)
            if found.kind in KNOWN:
                compare(result, found, interpreter.env)
            return (result,)

        return run


def compare(mask: Tensor, found: Mask, values: dict[fx.Node, Any]) -> None:
    """Element by element."""
    batch, _, queries, keys = mask.shape
    row, column = torch.arange(queries)[:, None], torch.arange(keys)
    expected = column <= row if found.kind == "causal" else torch.ones(queries, keys).bool()
    if found.valid is not None:
        table = [[table_entry(found.valid, values, b, k) for k in range(keys)]
                 for b in range(batch)]  # fmt: skip
        expected = expected & torch.tensor(table)[:, None, None]
    seen = mask if mask.dtype == torch.bool else mask == 0
    assert seen.equal(expected.expand(mask.shape))
    if mask.dtype != torch.bool:
        assert (mask[~seen] < SMALL).all()
        assert found.valid is None or (mask[~seen] == found.lowered).all()


def table_entry(valid: Value, values: dict[fx.Node, Any], batch: int, key: int) -> Value:
    while isinstance(valid, If):
        place = {"batch": batch, "key": key}
        indices = [
            each.constant + sum(place[name] * factor for name, factor in each.terms)
            for each in valid.condition.indices
        ]
        valid = valid.yes if values[valid.condition.node][tuple(indices)] else valid.no
    return valid


def read(code: str, dynamic: bool) -> list[Mask]:
    """What is read of a mask, given as code of `n`, a table `t` [3, n], `q` and `k`;
    `low` is the least number of float32."""
    code = code.replace("low", f"({LOWEST})")
    expression = eval(f"lambda torch, t, n, q, k: {code}")

    def build(t: Tensor) -> Tensor:
        n = t.shape[1]
        q, k = torch.arange(n)[None, None, :, None], torch.arange(n)[None, None, None, :]
        mask: Tensor = expression(torch, t, n, q, k)
        return mask.expand(t.shape[0], 2, n, n)

    build(torch.ones(3, LENGTHS[0], dtype=torch.long))  # whether it means anything at all
    torch._dynamo.reset()
    reader = Reader()
    compiled = torch.compile(build, backend=reader, fullgraph=True, dynamic=dynamic)
    for length in LENGTHS if dynamic else LENGTHS[:1]:
        compiled(torch.randint(-3, 9, (3, length)))
        compiled(torch.randint(-1, 2, (3, length)))
    return reader.found


small = st.integers(-3, 12)
numbers = st.deferred(
    lambda: st.one_of(
        st.sampled_from(["q", "k", "t[:, None, None, :]", "t[:, None, :, None]", "(q - k)"]),
        st.builds("({} {} {})".format, numbers, st.sampled_from("+-"), numbers),
        st.builds("({} * {})".format, numbers, small),
        st.builds("({} // {})".format, numbers, st.integers(1, 40)),
        st.builds("({} % {})".format, numbers, st.integers(1, 40)),
        st.builds("{}.float()".format, numbers),
        st.builds("({} * 0.5)".format, numbers),
        st.builds("{}.float().abs().sqrt()".format, numbers),
        st.builds("{}.clamp(min={})".format, numbers, small),
        st.builds("{}.abs()".format, numbers),
        st.builds("torch.maximum({}.int(), {}.int())".format, numbers, numbers),
        st.builds("torch.where({}, {}, {})".format, conditions, numbers, small),
        st.builds("{}.transpose(2, 3)".format, numbers),
        st.builds("{}.flip(3)".format, numbers),
        st.builds("{}[..., torch.arange(n).clamp(max=3)]".format,
                  numbers.map("{}.expand(3, 1, n, n)".format)),
        st.just("torch.ones(n, n).cumsum(0)[None, None]"),
    )
)  # fmt: skip
limits = st.one_of(small, st.floats(-5, 40), st.sampled_from(["n", "n - 1", "0.5 * n"]))
conditions = st.deferred(
    lambda: st.one_of(
        st.builds("({} {} {})".format, numbers, compared, limits),
        st.builds("({} {} {})".format, numbers, compared, numbers),
        st.sampled_from(["(k <= q)", "(t != 0)[:, None, None]", "(t > 2)[:, None, None]"]),
        st.builds("({} {} {})".format, conditions, st.sampled_from("&|^"), conditions),
        st.builds("(~{})".format, conditions),
        st.builds("{}.expand(3, 1, n, n).{}({})".format, conditions,
                  st.sampled_from(["tril", "triu"]), small),
        st.builds("{}.bool()".format, numbers),
    )
)  # fmt: skip
compared = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])
nearly = st.builds(
    "({} {} {})".format,
    st.sampled_from(["(k <= q)", "(q + 1 > k)", "(q >= 0)", "((t > 2)[:, None, None] & (k <= q))"]),
    st.sampled_from("&&&|"),
    conditions,
)
masks = st.builds(
    str.format,
    st.sampled_from([
        "{}", "torch.where({}, 0.0, low)", "torch.zeros(1, 1, n, n).masked_fill(~{}, -torch.inf)",
        "(1 - {}.float()) * low", "({}.float() - 1) * 1e30",
    ]),
    nearly | conditions,
)  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(code=masks)
def test_what_is_read_is_so(code: str, dynamic: bool) -> None:
    try:
        read(code, dynamic)
    except (RuntimeError, IndexError, TypeError) as error:  # `-` of bools, say
        assume("accel" in "".join(traceback.format_tb(error.__traceback__)[-1:]))
        raise


SPELLINGS = {
    "causal": [
        "k <= q", "q >= k", "k < q + 1", "~(k > q)", "(q - k) >= 0", "(k - q) < 1", "q - k > -1",
        "torch.ones(n, n, dtype=torch.bool).tril()", "torch.tril(torch.ones(n, n)).bool()",
        "~torch.ones(n, n, dtype=torch.bool).triu(1)", "torch.ones(n, n).triu(diagonal=1) == 0",
        "torch.full((n, n), -torch.inf).triu(1)", "torch.triu(torch.full((n, n), low), diagonal=1)",
        "torch.zeros(n, n).masked_fill((k > q)[0, 0], -torch.inf)",
        "torch.where(k <= q, 0.0, low)", "(1.0 - (k <= q).float()) * low",
        "((k <= q).float() - 1) * 1e30", "torch.where((q - k).float() < 0, low, 0.0)",
        "torch.ones(n, n, dtype=torch.bool).triu().t()", "(k.mT <= q.mT).mT",
        "torch.ones(n, n).cumsum(0) >= torch.ones(n, n).cumsum(1)",
        "torch.logical_not(torch.gt(k, q))", "torch.ones(n, n).tril().to(torch.bool)[None, None]",
        "(k <= q) & (q < n)", "(k <= q) | (k < 0)", "(k * 2 <= q * 2 + 1)", "(k <= q) & (k < n)",
        "(q - k).clamp(min=-5) >= 0", "torch.maximum(q, k) == q", "(k <= q) ^ (k > n)",
        "torch.le(*torch.meshgrid(torch.arange(n), torch.arange(n), indexing='ij')[::-1])",
        "q.flip(2) <= k.flip(3)", "torch.arange(n)[:, None] >= torch.arange(n)",
        "torch.where(torch.ones(n, n).tril() == 1, torch.zeros(()), torch.tensor(low))",
        "(k <= q) & (t != 0)[:, None, None]", "(k <= q) & t.bool()[:, None, None, :]",
        "(k <= q) & ((t != 0) & (t != 5))[:, None, None]", "(k <= q) & (t % 3 > 0)[:, None, None]",
        "((k <= q) & (t > 0)[:, None, None]).expand(3, 2, n, n)",
        "torch.where((k <= q) & (t > 0)[:, None, None], 0.0, low)",
        "torch.full((n, n), low).triu(1)[None, None].masked_fill((t == 0)[:, None, None], low)",
        "(k <= q) & t.bool()[torch.arange(t.shape[0])[:, None, None, None], k]",
        "(k <= q) & (t.cumsum(1) > 0)[:, None, None]", "(k <= q) & (k % 3 == 0)",
        "(k <= q) & (t != 0)[:, None, None] & (k.float().sqrt() < 3)",
    ],
    "full": [
        "q >= 0", "(k <= q) | (k > q)", "torch.zeros(n, n)", "torch.ones(n, n, dtype=torch.bool)",
        "(t != 0)[:, None, None].expand(3, 2, n, n)", "t[:, None, None, :] > 0",
        "(1 - (t != 0)[:, None, None].float()) * low",
        "torch.where(t > 0, 0.0, low)[:, None, None]",
        "~(t == 0)[:, None, None] & (q >= 0)", "k < n", "q * 3 < n * 3",
    ],
}  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("code", "kind"), [(code, kind) for kind, codes in SPELLINGS.items() for code in codes]
)
def test_spellings(code: str, kind: str, dynamic: bool) -> None:
    assert {each.kind for each in read(code, dynamic)} == {kind}


@pytest.mark.parametrize(
    "code",
    [
        "(k <= q) & (q - k < 1000)", "(k <= q) & (q // 64 - k // 64 < 16)",
        "(k <= q) & ((q - k).float() < 700.5)", "(k <= q) & ((q - k).float().sqrt() < 27)",
        "(k <= q) & ((q - k) * 3 < 2200)", "(k <= q) | (k % 700 == 650)", "k < q", "k <= q + 1",
        "(k <= q) & ((q - k).float() < 0.5 * n)", "(1 - t.float()[:, None, None]) * low",
        "(k <= q) & (t[:, :, None] == t[:, None])[:, None]", "torch.where(k <= q, 0.0, -5.0)",
        "torch.where(k <= q, 0.0, -q * 1e6)", "k.to(torch.bfloat16) <= q.to(torch.bfloat16)",
        "(k <= q) & (t > 0)[:, None, None, 0:1]" " & (t[:, None, None] != 2).flip(3)",
    ],
)  # fmt: skip
def test_what_hides_more_is_not_known_where_sizes_are_free(code: str) -> None:
    assert not {each.kind for each in read(code, dynamic=True)} & set(KNOWN)
