"""Callbacks of pipelines, which may edit what the next step is made of."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["noticing"]


def noticing(callback: Any, edited: Callable[[], None]) -> Any:
    """A callback that does what `callback` does, and calls `edited` where it has put another tensor
    in a tensor's place or has written to one.

    Torch counts writes; to tensors of the inference mode it doesn't, so that these are compared.
    Those of diffusers stay what they are: pipelines ask for their class and their `tensor_inputs`.
    """

    def noticed(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        written = _watched(given)
        # The callback may write to the mapping that it is given, too, and return it.
        named = [dict(each) for each in given if isinstance(each, dict)]
        returned = call(*args, **kwargs)
        found = returned if isinstance(returned, dict) else {}
        replaced = any(
            found.get(name, tensor) is not tensor
            for each in named for name, tensor in each.items() if isinstance(tensor, Tensor)
        )  # fmt: skip
        if replaced or any(each() for each in written):
            edited()
        return returned

    if hasattr(callback, "tensor_inputs"):
        kind = type(callback)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return noticed(kind.__call__.__get__(self), *args, **kwargs)

        watched = copy.copy(callback)
        watched.__class__ = type(kind.__name__, (kind,), {"__call__": call})
        return watched
    return functools.wraps(callback)(functools.partial(noticed, callback))


def _watched(given: Iterable[Any]) -> list[Callable[[], bool]]:
    """For each tensor among arguments, what says whether it has been written to since."""
    flat = [each for one in given for each in (one.values() if isinstance(one, dict) else (one,))]
    return [_written(each) for each in flat if isinstance(each, Tensor)]


def _written(tensor: Tensor) -> Callable[[], bool]:
    if tensor.is_inference():
        before = tensor.clone()
        return lambda: not torch.equal(tensor, before)
    version = tensor._version
    return lambda: tensor._version != version
