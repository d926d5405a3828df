"""Options from dicts: every dataclass of options checks itself, and unknown keys are named."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from ..kernels.errors import OptionError

__all__ = ["built", "check_known"]

Config = TypeVar("Config")


def check_known(key: Any, known: Iterable[str], where: str) -> None:
    """Raise OptionError naming the nearest known key where `key` is none of them."""
    names = list(known)
    if key not in names:
        near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.0)
        raise OptionError(
            f"unknown option {key!r} in {where}; did you mean {near[0]!r}? "
            f"(known: {', '.join(names)})"
        )


def built(kind: type[Config], values: Any, where: str) -> Config:
    """A dataclass of options from a mapping. Raises OptionError for what it does not know."""
    if not isinstance(values, Mapping):
        raise OptionError(f"{where} is {values!r}; it has to be a dict")
    # A TypeVar can't be bound to "any dataclass", so mypy doubts that this one is.
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in values:
        check_known(key, known, where)
    return kind(**values)
