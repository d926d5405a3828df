"""Taking nested arguments and results apart into leaves with paths, and putting them together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils._pytree import MappingKey, SequenceKey, tree_flatten_with_path

__all__ = ["Path", "flatten", "nested"]

# Where a value is inside nested arguments: names of dict entries, positions in sequences.
Path = tuple[str | int, ...]


def flatten(value: Any) -> list[tuple[Path, Any]]:
    """Every leaf of nested dicts and sequences, with where it is."""
    leaves = tree_flatten_with_path(_plain(value))[0]
    return [(tuple(map(_key, path)), leaf) for path, leaf in leaves]


def _plain(value: Any) -> Any:
    """Results of diffusers, transformers and engines are dicts that pytree has no names for."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    return value


def _key(key: Any) -> str | int:
    if isinstance(key, MappingKey) and isinstance(key.key, (str, int)):
        return key.key
    if isinstance(key, SequenceKey):
        return key.idx
    return str(key)


def nested(leaves: Mapping[Path, Any]) -> Any:
    """Leaves put together again: names make a dict, numbers a tuple."""
    if set(leaves) == {()}:
        return leaves[()]
    groups: dict[str | int, dict[Path, Any]] = {}
    for path, value in leaves.items():
        groups.setdefault(path[0], {})[path[1:]] = value
    numbers = [key for key in groups if isinstance(key, int)]
    if groups and len(numbers) == len(groups):
        return tuple(nested(groups[number]) for number in sorted(numbers))
    return {key: nested(each) for key, each in groups.items()}
