"""What a call of a graph says of itself: its sample, its conditions, its time, all on the CPU."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...passes.pade import rules
from ...passes.pade.clock import Clock
from .digest import at_hand, named, on_host, parts_of
from .provenance import MOST, few, flattened, positions
from .steps import Call, Sample
from .trajectory import Explicit, Moment

__all__ = ["Glimpse", "Hashes", "Reader", "Seen"]

FEWEST, TOGETHER = 128, 8192  # positions of a sample that are fitted at the least, and of a batch
HELD = 2**16  # bytes of a tensor up to which it is read at every call, whatever torch counts
REMEMBERED = 1024  # hashes of larger tensors

Places = tuple[Tensor, Tensor, torch.Size]  # in a sample, in its output, and that one's shape
_calls = itertools.count()


@dataclass
class Seen:
    """What was read of a call, on the CPU. values: of each part, [batch, positions]. keys: hashes
    of each sample; conditions: one entry for all samples or one for each. left: what else was read.
    depth: how many steps the run had before, where that was said.
    """

    values: list[Tensor]
    keys: list[bytes]
    times: list[Tensor]
    conditions: list[list[Any]]
    left: list[list[Tensor]]
    depth: int | None = None


@dataclass(frozen=True)
class Glimpse:
    """A call's samples and the model's outputs at some positions, [batch, positions] for each part,
    on their device; box: what the positions lie in, and how many they are. All empty where outputs
    do not look like samples."""

    values: list[Tensor] = field(default_factory=list)
    answers: list[Tensor] = field(default_factory=list)
    box: tuple[Any, ...] = ()


class Hashes:
    """Those of a model's larger tensors that are unchanged, as far as torch counts."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[weakref.ref[Tensor], int, list[bytes]]] = {}

    def get(self, tensor: Tensor) -> list[bytes] | None:
        """None for a tensor that is to be read."""
        if tensor.nbytes <= HELD or tensor.is_inference():
            return None
        known = self.known.get(id(tensor))
        same = known is not None and known[0]() is tensor and known[1] == tensor._version
        return known[2] if known is not None and same else None

    def put(self, tensor: Tensor, hashes: list[bytes]) -> None:
        """Remember what a tensor was read as."""
        if tensor.nbytes > HELD and not tensor.is_inference():
            if len(self.known) >= REMEMBERED:
                self.known.clear()
            self.known[id(tensor)] = weakref.ref(tensor), tensor._version, hashes


class Reader:
    """Reads the calls of one graph. clock: which inputs are what."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.places: dict[Any, Places | None] = {}

    def samples(self, inputs: Sequence[Any]) -> list[Tensor]:
        """The inputs that are the sample; none where they have no batch in common."""
        found = [inputs[index].detach() for index in self.clock.latents]
        together = len({each.shape[:1] for each in found}) == 1 and all(e.dim() for e in found)
        return found if together else []

    def blind(self, inputs: Sequence[Any]) -> bool:
        """Whether nothing of a call can be proven."""
        samples = self.samples(inputs)
        forms = enumerate(map(_form, samples))
        return not samples or any(self.places.get(each, ()) is None for each in forms)

    def read(
        self,
        hashes: Hashes,
        inputs: Sequence[Any],
        left: Sequence[Sequence[Tensor]],
        most: int = MOST,
    ) -> tuple[Seen, bool]:
        """What a call says, and the tensors of `left`; and whether a device was waited for, which
        it is once at the most. most: positions of each sample that are looked at; 0 for none."""
        samples = self.samples(inputs)
        batch = len(samples[0]) if samples else 1
        places = [self.places.get(each) for each in enumerate(map(_form, samples))]
        values = [
            each.flatten(1)[:, few(place[0], most)]
            for each, place in zip(samples, places, strict=True) if place is not None and most
        ]  # fmt: skip
        keys = [parts_of(each) for each in samples]
        conditions: list[Any] = []
        hashed: list[tuple[int, Tensor, Tensor]] = []
        for index in self.clock.conditions:
            value = inputs[index]
            if not isinstance(value, Tensor):
                conditions.append([value])
                continue
            known = hashes.get(value)
            if known is None:
                rows = value if value.dim() and len(value) == batch > 1 else value[None]
                hashed.append((len(conditions), value, rows))
            conditions.append(known)
        parts = [parts_of(rows) for _, _, rows in hashed]
        times = [torch.as_tensor(inputs[index]).detach() for index in self.clock.times]
        everything = [*values, *keys, *parts, *times, *itertools.chain.from_iterable(left)]
        waited = not at_hand(everything)
        read = iter(on_host(everything))
        seen_values = [next(read) for _ in values]
        seen_keys = [named(sample, next(read)) for sample in samples]
        for place, value, rows in hashed:
            conditions[place] = named(rows, next(read))
            hashes.put(value, conditions[place])
        seen = Seen(
            seen_values if len(seen_values) == len(samples) else [],
            # Where no sample is known, nothing tells calls apart, so each is a run of its own.
            [b"".join(each) for each in zip(*seen_keys, strict=True)] or [_unique()],
            [next(read) for _ in times],
            conditions,
            [[next(read) for _ in some] for some in left],
        )
        return seen, waited

    def told(self, run: Explicit, moment: Moment, inputs: Sequence[Any]) -> Seen:
        """What a call says where a pipeline says the step and its time: no tensor is read.

        Conditions are where they lie: what is kept alive and unchanged there is the same.
        """
        samples = self.samples(inputs)
        values = [inputs[index] for index in self.clock.conditions]
        run.keep(moment.step, [each for each in values if isinstance(each, Tensor)])
        conditions = [[_place(each) if isinstance(each, Tensor) else each] for each in values]
        time = torch.tensor([moment.time], dtype=torch.float64)
        batch = len(samples[0]) if samples else 1
        keys = [f"{moment.step} {index}".encode() for index in range(batch)]
        return Seen([], keys, [time], conditions, [], moment.step)

    def call(self, inputs: Sequence[Any], seen: Seen) -> Call:
        """What is seen of a call, sample by sample."""
        samples = self.samples(inputs)
        batch = len(seen.keys)
        times = [rules.sample_times([each], batch).tolist() for each in seen.times]
        columns = [*seen.conditions, *times]
        conditions = [
            tuple(column[index if len(column) > 1 else 0] for column in columns)
            for index in range(batch)
        ]
        first = len(seen.conditions)
        return Call(
            form=tuple(map(_form, samples)),
            samples=[
                Sample(tuple(part[index] for part in seen.values), key)
                for index, key in enumerate(seen.keys)
            ],
            conditions=conditions,
            clock=frozenset(range(first, first + len(times))),
            dtype=_coarsest([each.dtype for each in samples]),
            depth=seen.depth,
            time_error=max(map(_rounded, seen.times), default=(0.0, 0.0)),
        )

    def glimpse(self, inputs: Sequence[Any], results: Sequence[Any], most: int = MOST) -> Glimpse:
        """Samples and outputs of a call that has been done, at the positions that are looked at."""
        if not most:
            return Glimpse()
        values, answers, box = [], [], list[Any]()
        samples = self.samples(inputs)
        for part, sample in enumerate(samples):
            answer = results[self.clock.answers[part]].detach()
            place = self._places(part, sample, answer)
            if place is None:
                return Glimpse()
            values.append(sample.flatten(1)[:, few(place[0], most)])
            answers.append(answer.flatten(1)[:, few(place[1], most)])
            box.append(tuple(map(min, sample.shape[1:], answer.shape[1:])))
        return Glimpse(values, answers, (*box, values[-1].shape[1] if values else 0))

    def _places(self, part: int, sample: Tensor, answer: Tensor) -> Places | None:
        """Positions in a sample and in its output, both flattened; None where they do not fit."""
        form = part, _form(sample)
        if form not in self.places:
            box = [*map(min, sample.shape[1:], answer.shape[1:])]
            fits = sample.dim() == answer.dim() and len(sample) == len(answer) and box
            self.places[form] = None
            if fits:
                chosen = positions(box, min(max(TOGETHER // max(len(sample), 1), FEWEST), MOST))
                self.places[form] = (
                    flattened(chosen, sample.shape[1:]).to(sample.device),
                    flattened(chosen, answer.shape[1:]).to(answer.device),
                    answer.shape,
                )
        known = self.places[form]
        # Results of other sizes are not those that were looked at.
        return None if known is None or known[2] != answer.shape else known


def _unique() -> bytes:
    return f"call {next(_calls)}".encode()


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.device


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies, and how often torch has counted a change of it."""
    version = None if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, version


def _coarsest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    floating = [each for each in dtypes if each.is_floating_point]
    return max(floating, key=lambda each: torch.finfo(each).eps, default=torch.float32)


def _rounded(times: Tensor) -> tuple[float, float]:
    """How far times may be from what they were before they were rounded: as a part, and in all."""
    if not times.is_floating_point():
        return 0.0, 0.5
    error = torch.finfo(times.dtype).eps / 2
    return (error if error > 1e-5 else 0.0), 0.0
