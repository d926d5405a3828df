"""What accel's own operators cost, as each says beside its definition.

    COSTS[torch.ops.accel.recurrence.default] = _flops

A formula takes the operator's arguments and returns multiplications and additions of its matrix
products; sizes may be symbolic. Passes read it (`passes.graph.facts`), as they read torch's
operators' from `torch.utils.flop_counter`. To register there would import Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["COSTS"]

COSTS: dict[Any, Callable[..., Any]] = {}
