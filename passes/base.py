"""What every pass shares: reasons, results and the graph that travels through the pipeline."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import fx

from .graph.facts import Memory
from .graph.nodes import mark_inputs, results_of

__all__ = ["GraphPass", "PassResult", "Program", "Reason", "Skip"]


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
    """What a pass did to one graph. An empty `matched` means the graph is as it was."""

    name: str
    matched: tuple[str, ...] = ()
    skipped: tuple[Skip, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """A graph on its way through the passes, with the state that was added so far.

    The caller's inputs and its `outputs` results come first, in the caller's order; the inputs that
    follow are the `tables`; all else that follows belongs to `state`.
    removed: calls with an effect that passes have taken out on purpose, by name.
    """

    module: fx.GraphModule
    outputs: int
    training: bool
    state: Any = None  # pade.StackState
    tables: Any = None  # codebook.Tables
    removed: tuple[str, ...] = ()

    @cached_property
    def memory(self) -> Memory:
        """What shares memory in the graph, which no pass changes once it is a program's."""
        return Memory(self.module.graph)

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


class GraphPass(Protocol):
    """A rewrite. `run` returns the same program object if it changed nothing."""

    @property
    def name(self) -> str: ...

    def run(self, program: Program) -> tuple[Program, PassResult]: ...
