"""The contract of a pass: what it is, what it returns, and the program that travels through them.

A pass is a frozen dataclass whose fields are its options. `run` looks a program over and returns
it as it was, with reasons, or a new one. What a rewritten graph takes and returns beyond the
model's own inputs and results is said by `Added`, so that whoever runs or writes the graph need
not know which pass asked for it.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, fx, nn

from ..kernels.errors import VerificationError
from .graph.emit import Slot
from .graph.facts import Memory
from .graph.nodes import mark_inputs, results_of

__all__ = ["Added", "Constants", "Feature", "Pass", "PassResult", "Program", "Reason", "Skip",
           "Slot", "State"]  # fmt: skip


class Reason(enum.Enum):
    """Why a pass declined."""

    OFF = "turned off"
    NO_BLOCKS = "no repeated blocks"
    NO_TIMESTEP = "no timestep"
    NO_PARTNER = "no residual partner"
    TRAINING = "training graph"
    IMPURE = "side effects inside the region"
    NOT_ISOMORPHIC = "blocks differ"
    FORMAT = "the file format can't hold it"
    BROKEN = "failed verification"
    RAISED = "an error inside the pass"
    NO_ATTENTION = "no attention"
    ATTENTION_FORM = "attention of another form"
    MASK = "a mask"
    SHORT = "a short sequence"
    DEVICE = "no kernel for the device"
    NO_CACHE = "no key and value cache"
    CACHE_FORM = "a cache of another form"
    NO_TABLES = "nothing to fold"
    TOO_LARGE = "a table too large"
    TOO_SMALL = "blocks too small to share"
    UNSUPPORTED_VALUE = "a value that cannot cross the region's border"
    NO_PROJECTIONS = "no projections of one value"


@dataclass(frozen=True)
class Skip:
    """One thing that a pass looked at and left alone."""

    reason: Reason
    detail: str
    node: str = ""

    def __str__(self) -> str:
        where = f" at {self.node}" if self.node else ""
        return f"{self.reason.value}{where}: {self.detail}"


@dataclass(frozen=True)
class PassResult:
    """What a pass did to one graph. An empty `matched` means the graph is as it was.

    seconds: that the pass took, its verification included; set by who runs it.
    """

    name: str
    matched: tuple[str, ...] = ()
    skipped: tuple[Skip, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


class Feature(enum.Enum):
    """What a rewritten graph may need of whoever compiles, writes or runs it."""

    BRANCH = "a branch"
    SHARED_SUBGRAPHS = "calls of shared subgraphs"
    OPERATORS = "accel's own operators"
    STATE = "state between calls"
    CONSTANTS = "tensors computed from the weights"
    SHORT_CALLS = "calls that are short, as most of the work is done before them"


class Added(Protocol):
    """What a pass adds to a graph's border.

    inputs: in the graph's order. outputs: results that follow those before, likewise.
    """

    @property
    def inputs(self) -> tuple[Slot, ...]: ...

    @property
    def outputs(self) -> tuple[Slot, ...]: ...


@dataclass(frozen=True)
class Constants:
    """Inputs that are functions of the model's weights alone: tables, fused weights.

    module: from the weights to these inputs. sources: which of the program's first inputs the
    weights are. inputs: see `Added`.
    """

    module: nn.Module
    sources: tuple[int, ...]
    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...] = ()

    @torch.no_grad()
    def computed(self, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        """The tensors, given the program's first inputs; checked before anything reads them."""
        made = self.module(*(inputs[index] for index in self.sources))
        tensors = tuple(each.contiguous() for each in made)
        found = [(tuple(each.shape), each.dtype, each.device) for each in tensors]
        wanted = [(each.shape, each.dtype, each.device) for each in self.inputs]
        if found != wanted:
            raise VerificationError(
                f"{', '.join(each.name for each in self.inputs)} of {wanted} became {found}. This "
                "is a bug in accel; turning the pass off that computes them avoids it"
            )
        return tensors


class State(Added, Protocol):
    """Inputs that a run carries from one call to the next, and the results that renew them."""

    def bytes(self) -> int:
        """Bytes of one run's state, with symbolic sizes at their hints."""


@dataclass(frozen=True)
class Program:
    """A graph on its way through the passes, with what was added to its border so far.

    The caller's inputs and its `outputs` results come first, in the caller's order; those of
    `added` follow in turn.
    features: of the passes that have changed it. removed: calls with an effect that passes have
    taken out on purpose, by name.
    """

    module: fx.GraphModule
    outputs: int
    training: bool
    added: tuple[Added, ...] = ()
    features: frozenset[Feature] = frozenset()
    removed: tuple[str, ...] = ()

    @cached_property
    def memory(self) -> Memory:
        """What shares memory in the graph, which no pass changes once it is a program's."""
        return Memory(self.module.graph)

    @property
    def constants(self) -> tuple[Constants, ...]:
        """What was added that depends on the weights alone."""
        return tuple(each for each in self.added if isinstance(each, Constants))

    @property
    def state(self) -> Any:
        """What was added that runs carry; None where nothing was."""
        found = [each for each in self.added if not isinstance(each, Constants)]
        return found[0] if found else None

    @staticmethod
    def capture(module: fx.GraphModule) -> Program:
        """The program of a graph that Dynamo has just captured."""
        mark_inputs(module.graph)
        placeholders = module.graph.find_nodes(op="placeholder")
        values = (node.meta.get("example_value") for node in placeholders)
        needs_gradient = any(
            isinstance(value, torch.Tensor) and value.requires_grad for value in values
        )
        return Program(
            module=module,
            outputs=len(results_of(module.graph)),
            training=torch.is_grad_enabled() and needs_gradient,
        )


@dataclass(frozen=True)
class Pass:
    """A rewrite. Its fields are its options: they check themselves, and have defaults.

    name: of the pass and of its option. summary, applies, keeps: what it does, when, and what
    state that leaves, for tables in pages. default: whether it is on where nothing is said.
    features: what a program needs after it.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    applies: ClassVar[str]
    keeps: ClassVar[str] = "none"
    default: ClassVar[bool] = False
    features: ClassVar[frozenset[Feature]] = frozenset()

    def run(self, program: Program) -> tuple[Program, PassResult]:
        """The same program object where nothing is to be done, with reasons; else a new one. The
        graph that it was given stays as it is."""
        raise NotImplementedError
