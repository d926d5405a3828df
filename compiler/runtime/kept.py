"""What is kept of each model that a graph runs: what its calls have left, what tells whether its
weights are the same, and what happened."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from ...passes.pade.rules import Carried
from .digest import Later
from .fingerprint import Fingerprint
from .reading import Glimpse, Hashes
from .runs import Runs
from .steps import Evaluation

__all__ = [
    "COUNTED",
    "Counters",
    "Course",
    "Model",
    "Record",
    "Weights",
    "device_memory",
    "state_bytes",
]


@dataclass
class Counters:
    """What happened at run time, for one model in one graph."""

    full_steps: int = 0
    predicted_steps: int = 0
    repeated_steps: int = 0
    untrusted_steps: int = 0
    gated_steps: int = 0
    nonfinite_steps: int = 0
    corrected_steps: int = 0
    calibrated_steps: int = 0
    weight_changes: int = 0
    host_reads: int = 0
    roots: dict[str, int] = field(default_factory=dict)
    uncalibrated: dict[str, int] = field(default_factory=dict)
    last_error: float = float("nan")


# The counters that are whole numbers, by the names that `Stats` has for them, too.
COUNTED = tuple(each.name for each in fields(Counters) if each.type == "int")


@dataclass(frozen=True)
class Course:
    """How a run has gone, as far as its model's profile cares. depth, time: of the first step that
    is known of it. strange: what is not as the profile has it; empty for nothing."""

    depth: int
    time: float
    strange: str = ""


@dataclass(eq=False)
class Record:
    """What a call has left. carried: the state after it; None where that was dropped.

    known: how many residuals there are to predict from. epoch: of the weights that computed them.
    glimpse, pending: the call's sample and outputs, and moments of a computed step; on their
    device, until they have been read. later: a copy of them that is on its way.
    corrected: whether it gave back what predicted steps had missed. course: how its run has gone,
    where its model has a profile.
    """

    carried: Carried | None
    known: int
    epoch: int
    glimpse: Glimpse
    pending: list[Tensor]
    corrected: bool = False
    course: Course | None = None
    evaluations: list[Evaluation] = field(default_factory=list)
    why_not: str = ""
    later: Later | None = None

    @property
    def left(self) -> list[Tensor]:
        """What is to be read of it."""
        return [*self.glimpse.values, *self.glimpse.answers, *self.pending]

    def held(self) -> dict[int, Tensor]:
        """The tensors of its state. Entries beyond the known ones are the oldest one again."""
        if self.carried is None:
            return {}
        return {
            id(tensor): tensor for stream in self.carried.streams
            for tensor in (*stream.residuals, stream.previous) if tensor is not None
        } | {
            id(tensor): tensor for each in self.carried.answers
            for tensor in (each.computed, each.predicted)
        }  # fmt: skip


class Weights:
    """What a model's weights are, so that a later call can tell whether they have changed.

    Those without memory of their own (that wrap others, quantised ones) are told by torch's count
    of changes alone.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.bits = Fingerprint.of(weights)
        self.versions = self._versions(weights)

    def changed(self, weights: Sequence[Tensor]) -> bool:
        if self.bits is not None:
            return self.bits.changed(weights)
        return self._versions(weights) != self.versions

    @staticmethod
    def _versions(weights: Sequence[Tensor]) -> list[int]:
        return [each._version for each in weights if not each.is_inference()]


@dataclass(eq=False)
class Model:
    """The runs and counters of one model. Dynamo may run several models by one graph.

    held: its weights, as long as they live: adapters may be deleted; an engine's graph itself.
    epoch: how often its weights were seen to change. What other weights computed is no history of
    what these compute, whoever holds it. fit: for which epoch and sizes it is known what a profile
    has that the model has not; misfit: what that is; empty for nothing.
    """

    owner: weakref.ref[Any]
    held: list[weakref.ref[Any]]
    runs: Runs
    epoch: int = 0
    counters: Counters = field(default_factory=Counters)
    hashes: Hashes = field(default_factory=Hashes)
    weights: Weights | None = None
    unread: list[Record] = field(default_factory=list)
    fit: tuple[int, Any] | None = None
    misfit: str = ""


@functools.cache
def device_memory(device: torch.device) -> int:
    """Bytes of memory that a device has; of the host, where the device does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def state_bytes(runs: Runs) -> int:
    """Bytes of state that all runs hold."""
    held: dict[int, Tensor] = {}
    for known in runs.records.values():
        held |= known.record.held()
    return sum(each.nbytes for each in held.values())
