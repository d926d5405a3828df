"""What transformers calls a model's cache: `past_key_values`, and from 5.24 on `cache`."""

from __future__ import annotations

import inspect
from typing import Any

from transformers.generation.utils import ALL_CACHE_NAMES as OF_THIS_VERSION

__all__ = ["CACHE_NAMES", "cache_name"]

CACHE_NAMES = tuple(dict.fromkeys((*OF_THIS_VERSION, "cache", "past_key_values")))


def cache_name(model: Any) -> str:
    """The parameter of a model's forward that takes a cache: the one it names, else the one that
    this version of transformers has."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[0])
