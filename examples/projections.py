"""Where one product of matrices beats two or three: Inductor with and without `fuse_projections`.

    python -m accel.examples.projections

A block of a language model (attention, then a gated feed-forward layer) in float32, at several
widths, numbers of tokens and of threads. Both compiled forms take turns, so that what else the
machine does meets both. Some two minutes on two free CPU cores, most of it compiling.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

__all__ = ["Block", "alternating", "main"]

HEAD = 64


class Block(nn.Module):
    """[batch, tokens, width] to the same: five layers that the pass makes two, and two others."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.gate, self.up = (nn.Linear(width, 4 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, value: Tensor) -> Tensor:
        normed = self.norms[0](value)
        query, key, values = (
            layer(normed).unflatten(-1, (-1, HEAD)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        seen = scaled_dot_product_attention(query, key, values, is_causal=True)
        seen = seen.transpose(1, 2).flatten(2)
        value = value + self.out(seen)
        normed = self.norms[1](value)
        result: Tensor = value + self.down(silu(self.gate(normed)) * self.up(normed))
        return result


def alternating(
    functions: Sequence[Callable[[], Any]], seconds: float, at_least: int = 15
) -> list[list[float]]:
    """Seconds that a call of each takes, measured in turns of some milliseconds for `seconds`."""
    found: list[list[float]] = [[] for _ in functions]
    begin = time.perf_counter()
    functions[0]()
    calls = max(1, int(0.004 / (time.perf_counter() - begin)))
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(found[0]) < at_least:
        for function, times in zip(functions, found, strict=True):
            start = time.perf_counter()
            for _ in range(calls):
                function()
            times.append((time.perf_counter() - start) / calls)
    return found


def compiled(model: nn.Module, fused: bool) -> Any:
    options: dict[str, Any] = {"pade": False, "outline": False, "fuse_projections": fused}
    return torch.compile(model, backend="accel", fullgraph=True, options=options)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 768])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256, 1024])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row")
    arguments = parser.parse_args()
    print("| width | threads | tokens | plain ms | fused ms | speed-up | of the fastest calls |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for width in arguments.widths:
            torch._dynamo.reset()  # Inductor writes code for a number of threads
            torch.manual_seed(0)
            model = Block(width).eval()
            forms = [compiled(model, fused) for fused in (False, True)]
            for tokens in arguments.tokens:
                value = torch.randn(1, tokens, width)
                plain, fused = (form(value) for form in forms)
                torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)
                calls = [lambda form=form, value=value: form(value) for form in forms]
                times = alternating(calls, arguments.seconds)
                middle = [statistics.median(each) * 1000 for each in times]
                fastest = [min(each) for each in times]
                print(
                    f"| {width} | {threads} | {tokens} | {middle[0]:.3f} | {middle[1]:.3f} "
                    f"| {middle[0] / middle[1]:.2f} | {fastest[0] / fastest[1]:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
