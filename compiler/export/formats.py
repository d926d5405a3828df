"""What a file format of engines is: the type that `FORMATS` is a table of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Protocol

from torch import Tensor
from torch.export import ExportedProgram

from ...passes import Feature
from .manifest import Manifest

__all__ = ["Format", "Runner"]


class Runner(Protocol):
    """Calls the graph in a file: `Manifest.graph_inputs` in, `Manifest.graph_outputs` out.

    providers: what runs it, by name.
    """

    providers: list[str]

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]: ...


@dataclass(frozen=True)
class Format:
    """A kind of file that an engine is kept in. Its fields are the options of `accel.load`.

    suffix: of the file's name, with the dot. summary: what it holds and who runs that, in a few
    words. plain: whether accel's own operators have to go. cannot: features of a rewritten graph
    that it can't hold, and why.
    """

    suffix: ClassVar[str]
    summary: ClassVar[str]
    plain: ClassVar[bool] = True
    cannot: ClassVar[Mapping[Feature, str]] = MappingProxyType({})

    def files(self, path: Path) -> list[Path]:
        """The files that an engine at `path` may consist of."""
        return [path]

    def versions(self) -> dict[str, str]:
        """Of the libraries that write the file, besides torch. Raises MissingDependencyError."""
        return {}

    def write(self, program: ExportedProgram, manifest: Manifest, path: Path) -> None:
        """Write `program` with its manifest. Raises ExportError where the format can't hold it."""
        raise NotImplementedError

    def read(self, path: Path) -> tuple[Manifest, Runner]:
        """The manifest and a runner. Raises EngineError for a file that is not a sound engine."""
        raise NotImplementedError
