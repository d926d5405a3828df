"""Linear layers whose weights differ from user to user, and what generates those weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softsign

from ....kernels.errors import OptionError

__all__ = ["Generator", "LowRankLinear", "PerUserLinear", "dynamic_layer"]


class _Generated(nn.Module):
    """A layer that is handed some of its weights, `names`, at each call, by
    `torch.func.functional_call`."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.register_buffer(name, torch.empty(0), persistent=False)

    def _rows(self, input: Tensor, weight: Tensor) -> Tensor:
        """Inputs [B, ..., size] as [B, N, size], for weights [B, size, size']."""
        if weight.dim() != 3:
            raise OptionError(
                "a dynamic layer was called without its weights; call the model that dynamize "
                "returned, not the one in it"
            )
        if input.shape[0] != weight.shape[0]:
            raise OptionError(
                f"a dynamic layer's input has {input.shape[0]} rows, but the batch has "
                f"{weight.shape[0]} histories; needed is one row for each history, with candidates "
                "in a dimension of their own"
            )
        return input.reshape(input.shape[0], -1, input.shape[-1])


class PerUserLinear(_Generated):
    """A linear layer with a matrix and a bias for each user, as DUET generates them.

    weight: [B, in, out]; bias: [B, out].
    """

    weight: Tensor
    bias: Tensor

    def __init__(self) -> None:
        super().__init__("weight", "bias")

    def forward(self, input: Tensor) -> Tensor:
        """[B, ..., in] to [B, ..., out]."""
        rows = torch.baddbmm(self.bias[:, None], self._rows(input, self.weight), self.weight)
        return rows.reshape(*input.shape[:-1], rows.shape[-1])


class LowRankLinear(_Generated):
    """A linear layer of which a small square in the middle is the user's own, as in APG.

    core: [B, rank, rank]; before and after it are matrices that all users share.
    """

    core: Tensor

    def __init__(self, into: Tensor, out: Tensor, bias: Tensor) -> None:
        super().__init__("core")
        self.into, self.out = nn.Parameter(into), nn.Parameter(out)
        self.bias = nn.Parameter(bias)

    def forward(self, input: Tensor) -> Tensor:
        """[B, ..., in] to [B, ..., out]."""
        rows = torch.bmm(self._rows(input, self.core) @ self.into, self.core)
        result: Tensor = rows.reshape(*input.shape[:-1], rows.shape[-1]) @ self.out + self.bias
        return result


@torch.no_grad()
def dynamic_layer(
    layer: nn.Module, rank: int | None
) -> tuple[PerUserLinear | LowRankLinear, dict[str, Tensor]]:
    """What takes the place of `layer`; and with which weights it computes the same, but for what a
    rank below the layer's own leaves out. rank: of the part that is generated; None: all."""
    assert isinstance(layer, nn.Linear)
    weight = layer.weight.t().contiguous()
    bias = weight.new_zeros(weight.shape[1]) if layer.bias is None else layer.bias.clone()
    if rank is None:
        return PerUserLinear(), {"weight": weight, "bias": bias}
    # In float32, as there is no decomposition in half precision.
    left, values, right = torch.linalg.svd(weight.float(), full_matrices=False)
    into, out = (each.to(weight.dtype).contiguous() for each in (left[:, :rank], right[:rank]))
    return LowRankLinear(into, out, bias), {"core": torch.diag(values[:rank]).to(weight.dtype)}


class Generator(nn.Module):
    """The weights of one layer: a trunk, linear in one vector, and a small remainder in another.

    trunk: reshape(z A + a), where a is what the layer starts with. remainder: the same of another
    vector, kept within +-`bound` of zero, as the semantic part has to dominate (SOLID's metacode).
    The released code clips it, so that nothing is learnt where it is clipped; here
    bound * softsign(value / bound) bends it, whose slope is nowhere 0.
    """

    def __init__(self, start: dict[str, Tensor], width: int, bound: float | None) -> None:
        super().__init__()
        self.shapes = {name: tuple(each.shape) for name, each in start.items()}
        self.bound = bound
        flat = torch.cat([each.flatten() for each in start.values()])
        self.trunk = _from_zero(width, flat)
        self.remainder = None if bound is None else _from_zero(width, torch.zeros_like(flat))

    def forward(self, trunk: Tensor, remainder: Tensor | None) -> dict[str, Tensor]:
        """From vectors [B, width] each to weights of each name, [B, ...]."""
        values: Tensor = self.trunk(trunk)
        if self.remainder is not None and self.bound is not None:
            values = values + self.bound * softsign(self.remainder(remainder) / self.bound)
        parts = values.split([math.prod(shape) for shape in self.shapes.values()], dim=1)
        named = zip(self.shapes.items(), parts, strict=True)
        return {name: part.unflatten(1, shape) for (name, shape), part in named}


def _from_zero(width: int, start: Tensor) -> nn.Linear:
    """A layer that gives `start` for every input, until it has learnt."""
    layer = nn.Linear(width, len(start))
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(start)
    return layer
