"""Seeing a model's graphs: how `explain`, `export` and ZipAR have Dynamo capture one.

Under `torch.compile(model, backend="accel")` Dynamo calls the back end by itself; these three ask
it to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

__all__ = ["captured", "not_whole"]


Backend = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]
UNREACHED = 2**16  # compilations of one class


def not_whole() -> tuple[type[Exception], ...]:
    """What Dynamo raises for a model that it can't capture as one graph; the latter for sizes in
    data. Not named when this is imported, as Dynamo loads slowly."""
    return torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError


def captured(
    function: Callable[..., Any],
    backend: Backend,
    *,
    whole: bool = True,
    config: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Callable[..., Any]:
    """A callable like `function` that hands each of its graphs to `backend` and runs what that
    returns. It may compile at every call, however often this class was compiled before.

    whole: raise one of `not_whole` where it is not one graph. config: of Dynamo, during a call.
    settings: of `torch.compile`.
    """
    compiling: Any = torch.compile  # its stubs lack some of the settings
    compiled = compiling(function, backend=backend, fullgraph=whole, **settings)
    limits = {"recompile_limit": UNREACHED, "accumulated_recompile_limit": UNREACHED}
    dynamo: Any = torch._dynamo.config

    def call(*args: Any, **kwargs: Any) -> Any:
        with dynamo.patch(**limits, **(config or {})):
            return compiled(*args, **kwargs)

    return call
