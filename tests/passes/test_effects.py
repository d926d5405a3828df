"""Generated programs that write in place, through views, and draw: rewritten, they do the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accel
import torch
from accel.tests.passes.test_blocks import Timed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

VIEWS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x,
    lambda x: x.ravel(),
    lambda x: x.transpose(1, 2),
    lambda x: x.diagonal(dim1=1, dim2=2),
    lambda x: x.unfold(1, 2, 2),
    lambda x: x[:, 1:, ::2],
    lambda x: x.tensor_split(2, 1)[0],
    lambda x: torch.einsum("bld->bdl", x),
    lambda x: x.contiguous(),
    lambda x: x * 1.0,
    lambda x: x.mT.unflatten(1, (2, 4)),
]
CHANGES: list[Callable[[Tensor], Any]] = [
    lambda x: x.mul_(0.5),
    lambda x: x.add_(0.1),
    lambda x: nn.functional.relu(x, inplace=True),
    lambda x: x.clamp_(-1, 1),
    lambda x: torch.neg(x, out=x) if x.is_contiguous() else x.neg_(),
    lambda x: x.copy_(x.sin()),
    lambda x: x.__setitem__(0, 0.25),
    lambda x: torch._foreach_mul_([x], 0.9),
    lambda x: x.uniform_(0.0, 0.1),
]


class Program(Timed):
    """Blocks with statements between them. A statement changes a view of: a value from outside
    (shared by all blocks), the stream, or what the last block has added."""

    def __init__(self, statements: list[list[tuple[int, int, int]]]) -> None:
        super().__init__(len(statements))
        self.statements = statements

    def body(self, x: Tensor, time: Tensor) -> Tensor:
        shared = torch.tanh(x)
        own = torch.zeros_like(x)
        for block, statements in zip(self.blocks, self.statements, strict=True):
            added = block(x + 0.1 * shared + own) - x
            for target, view, change in statements:
                CHANGES[change](VIEWS[view]((shared, x, added, own)[target]))
            x = x + added
        return x


STATEMENT = st.tuples(
    st.integers(0, 3), st.integers(0, len(VIEWS) - 1), st.integers(0, len(CHANGES) - 1)
)


@settings(max_examples=25, deadline=None, derandomize=True,
          suppress_health_check=list(HealthCheck))  # fmt: skip
@given(st.lists(st.lists(STATEMENT, max_size=2), min_size=3, max_size=3))
def test_a_rewritten_program_does_what_it_did(statements: list[list[tuple[int, int, int]]]) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Program(statements).eval()
    inputs = torch.randn(2, 5, 8), torch.tensor([500.0, 500.0])
    options = {"lowering": "eager", "verify": True, "pade": {"schedule": "full"}}
    compiled = torch.compile(model, backend="accel", fullgraph=True, options=options)
    with torch.no_grad():
        torch.manual_seed(1)
        want = model(*inputs)
        torch.manual_seed(1)
        got = compiled(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert accel.report_of(compiled).graphs  # it was compiled, not run as it was
