"""Packages that accel can do without until they are needed."""

from __future__ import annotations

import importlib
from typing import Any

from ..kernels.errors import MissingDependencyError

__all__ = ["optional"]


def optional(module: str, extra: str) -> Any:
    """Import a module of an extra. Raises MissingDependencyError naming the `pip install` line."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"this needs {module.partition('.')[0]}: pip install 'accel-compiler[{extra}]'"
        ) from error
