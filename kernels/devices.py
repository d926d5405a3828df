"""Which of an operator's implementations is for a tensor's device."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

from torch import Tensor

from .errors import MissingDependencyError

__all__ = ["kernels_for"]


def kernels_for(tensor: Tensor, cpu: ModuleType, gpu: str, what: str) -> Any:
    """The module for a CPU; else the module `gpu`, by name, as it needs Triton. what: for the error
    (MissingDependencyError) where that is missing."""
    if tensor.device.type == "cpu":
        return cpu
    try:
        return import_module(gpu)
    except ImportError as error:
        raise MissingDependencyError(
            f"{what} on a GPU needs Triton: pip install 'accel-compiler[gpu]'"
        ) from error
