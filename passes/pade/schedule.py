"""Which steps of a sampling run are computed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...kernels.errors import OptionError

__all__ = [
    "PRESETS",
    "Auto",
    "Full",
    "Interval",
    "Listed",
    "Planned",
    "Schedule",
    "estimate_steps",
    "fits_times",
    "parse_schedule",
    "place",
    "says_length",
]

# Share of the steps that each preset computes.
PRESETS = {"quality": 0.5, "balanced": 0.4, "fast": 0.3}

# Where the computed steps lie: closer together at the start of the run, and the last one nearer to
# its end the more there are. The curve follows what local searches found for 6, 8 and 10 of 20
# steps on the reference model, on noise of their own (examples/fashion/bench measures on other).
GROWTH = 1.55
MOST = 0.5  # the share from which on the very last step is computed
LEAST = 0.3  # the share below which the last computed step comes no earlier
FEWEST = 4  # a run of so few steps is computed in full
SPACED = 1e-3  # how far times may be from a spacing that says how many there are
SURE = 1e-4  # the same, to count more than the length of a run that began alike
MORE = 3  # steps that are taken to follow where the times fit no length
WARMUP = 3  # of an interval schedule, where nothing else is said


def place(steps: int, computed: int, growth: float = GROWTH, together: int = 1) -> tuple[int, ...]:
    """`computed` of `steps` step numbers, the first among them.

    growth: how much further apart they are towards the end; 1 is evenly. together: how many at the
    start have none between them, where there are as many.

    >>> place(20, 8)
    (0, 1, 3, 5, 8, 11, 14, 18)
    """
    computed = max(min(computed, steps), min(steps, FEWEST))
    saved = MOST - min(max(computed / steps, LEAST), MOST)
    end = (1 - 4 * saved**2) * (steps - 1)
    chosen = list(range(max(min(together, computed - 1), 1)))
    before = len(chosen) - 1
    for index in range(len(chosen), computed):
        share = (index - before) / (computed - 1 - before)
        position = before + round((end - before) * share**growth)
        # At least one further than the last, and leaving room for those that follow.
        chosen.append(min(max(position, chosen[-1] + 1), steps - computed + index))
    return tuple(chosen)


def estimate_steps(
    times: Sequence[float], relative: float = 0.0, absolute: float = 0.0
) -> int | None:
    """How many steps a run will have, from the times of its first steps; None if they don't say.

    Samplers space their times evenly in u = 1 - i / N, or shift that (Flux, SD3, Wan):
    t = s u / (1 + (s - 1) u) up to a unit. With y_i = t_0 / t_i - 1 that gives
    y_i = (1/s) i / (N - i), so two steps tell both unknowns; one does not. Times that rise are
    taken to end at 1, or at 1000 where they pass 1.

    relative, absolute: how far a time may be from what it was before it was rounded. Of all lengths
    that fit the times so far within that the one in the middle is taken, or `FEWEST` or less.

    Other spacings (Karras, exponential, beta) do not say how many there will be: what is returned
    for them is a guess, and at least `MORE` steps are taken to follow, as each step that seems to
    be the last is computed.
    """
    if not times:
        return None
    distinct, often = _distinct(times)
    if often > 1:
        steps = estimate_steps(distinct, relative, absolute)
        return None if steps is None else steps + (steps - 1) * (often - 1)
    if len(distinct) < 3:
        return None
    times = _falling(times)
    first, last = times[0], len(times) - 1
    if times[last] <= 0 or times[1] > first or times[last] > times[1] or times[last] == first:
        return None
    fitting = [
        steps for steps in LENGTHS if steps > last and fits_times(steps, times, relative, absolute)
    ] if relative or absolute else []  # fmt: skip
    if fitting and fitting[0] <= FEWEST:
        return fitting[0]  # few steps are computed in full, so in doubt there are few
    if times[1] < first:
        one, other = first / times[1] - 1, first / times[last] - 1
        ratio = other / (last * one)
        if ratio > 1:
            exact = (ratio * last - 1) / (ratio - 1)
        else:  # not of that family (or two calls a step, as Heun's): go on at the mean pace
            exact = last + times[last] * last / (first - times[last])
        # Whole numbers are spaced as they were meant, more often than not.
        if not fitting or (absolute and fitting[0] <= exact <= fitting[-1]):
            found = min(max(round(exact), last + 1), 1000)
            guessed = last > 2 and not _spaced(found, times, relative, absolute, SPACED)
            return max(found, last + MORE) if guessed else found
    return fitting[len(fitting) // 2] if fitting else None


def says_length(
    steps: int, times: Sequence[float], relative: float = 0.0, absolute: float = 0.0
) -> bool:
    """Whether the times of a run's first steps say that it has so many; else that is a guess."""
    distinct, often = _distinct(times)
    if len(distinct) < 4:
        return False  # through three there is always some spacing
    # The inverse of how `estimate_steps` counts calls.
    return _spaced((steps + often - 1) // often, _falling(distinct), relative, absolute, SURE)


def _distinct(times: Sequence[float]) -> tuple[Sequence[float], int]:
    """Times without repeats, and how many calls a sampler has at each: 1 where only rounding
    repeats them."""
    counts = [(time, len(list(same))) for time, same in itertools.groupby(times)]
    distinct, often = [time for time, _ in counts], max(count for _, count in counts)
    # Solvers that call the model twice or more at a time do so at nearly all; rounding does not.
    if len(distinct) >= 3 and len(times) >= (len(distinct) - 2) * often + 2 > len(distinct):
        return distinct, often
    return (times if len(distinct) >= 3 else distinct), 1


def _falling(times: Sequence[float]) -> Sequence[float]:
    """Times that rise, as what is left of 1 or 1000."""
    if times[1] <= times[0]:
        return times
    end = 1.0 if max(times) <= 1.0 else 1000.0
    return [end - time for time in times]


def _spaced(
    steps: int, times: Sequence[float], relative: float, absolute: float, least: float
) -> bool:
    """Whether falling times are those of so many steps, shifted or not, to `least` of the first."""
    return fits_times(steps, times, max(relative, least), max(absolute, least * times[0]))


LENGTHS = (*range(3, 61), *range(64, 101, 4), 125, 150, 200, 250, 500, 1000)


def fits_times(
    steps: int, times: Sequence[float], relative: float = 0.0, absolute: float = 0.0
) -> bool:
    """Whether a run of so many steps may have these times, rounded by no more than that."""
    first, error = times[0], relative * abs(times[0]) + absolute
    most, least = first + error, first - error
    # It may if some shift s gives them: each bounds 1/s = (t_0 / t_i - 1) (N - i) / i twice.
    low, high = 0.0, math.inf
    for index, time in enumerate(times[1:], 1):
        left, error = (steps - index) / index, relative * abs(time) + absolute
        low = max(low, (least / (time + error) - 1) * left)
        if time > error:
            high = min(high, (most / (time - error) - 1) * left)
    return low <= high


class Schedule(Protocol):
    """Says which steps to compute."""

    def computes(self, step: int, last: int, steps: int | None, begun: int = 0) -> bool:
        """Whether to compute a step.

        step: its number, from 0; last: the newest computed step (-1 if none); steps: how many the
        run has, or will probably have; None if unknown. begun: the step that is the first of which
        something is known: later than 0 in a branch that begins inside the run, or where state was
        dropped (other weights, an edited sample).
        """

    def check(self, steps: int) -> None:
        """Raise OptionError if the schedule makes no sense for a run of `steps` steps."""


@dataclass(frozen=True)
class Full:
    """Always compute."""

    def computes(self, step: int, last: int, steps: int | None, begun: int = 0) -> bool:
        return True

    def check(self, steps: int) -> None:
        return None


@dataclass(frozen=True)
class Interval:
    """The first `warmup` steps (of a history, where it begins later), then every `interval`-th."""

    interval: int
    warmup: int = WARMUP

    def __post_init__(self) -> None:
        for name in ("interval", "warmup"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise OptionError(f"schedule {name} is {value!r}; it has to be a whole number >= 1")

    def computes(self, step: int, last: int, steps: int | None, begun: int = 0) -> bool:
        final = steps is not None and step == steps - 1
        warm = step < begun + self.warmup
        return warm or (step - self.warmup + 1) % self.interval == 0 or final

    def check(self, steps: int) -> None:
        return None


@dataclass(frozen=True)
class Listed:
    """Exactly these steps; and those that lie beyond the list by more than its largest gap.

    Nobody planned for the latter: the run is longer than the list was made for.
    """

    listed: tuple[int, ...]

    def __post_init__(self) -> None:
        if not all(isinstance(step, int) and step >= 0 for step in self.listed):
            raise OptionError(f"schedule {list(self.listed)} has entries that are not steps >= 0")
        if 0 not in self.listed:
            raise OptionError(
                f"schedule {list(self.listed)} leaves out step 0, but there is nothing to predict "
                "the first step from: add 0"
            )

    def computes(self, step: int, last: int, steps: int | None, begun: int = 0) -> bool:
        ordered = sorted(self.listed)
        gap = max((b - a for a, b in itertools.pairwise(ordered)), default=0)
        return step in self.listed or step > ordered[-1] + gap

    def check(self, steps: int) -> None:
        if max(self.listed) >= steps:
            raise OptionError(
                f"the schedule computes step {max(self.listed)}, but the run has only {steps} "
                f"steps (0 to {steps - 1})"
            )


@dataclass(frozen=True)
class Planned:
    """These steps of a run of so many; of a longer or shorter one those at the same shares of it.

    As with `Auto`, the rest of a run whose history begins later is placed as a run of its own.
    """

    planned: tuple[int, ...]
    length: int

    def placed(self, steps: int) -> tuple[int, ...]:
        """The computed steps of a run of a known length."""
        if steps == self.length:
            return self.planned
        if steps <= FEWEST:
            return tuple(range(steps))
        scale = (steps - 1) / (self.length - 1)
        return tuple(sorted({round(each * scale) for each in self.planned}))

    def computes(self, step: int, last: int, steps: int | None, begun: int = 0) -> bool:
        if begun:
            share = len(self.planned) / self.length
            return Auto(share).computes(step, last, steps, begun)
        return steps is None or _due(self.placed(steps), step, last, steps)

    def check(self, steps: int) -> None:
        return None


@dataclass(frozen=True)
class Auto:
    """A share of the steps, placed by `place`; the step count is estimated where unknown.

    Where a history begins later than the run, the rest is placed as a run of its own.
    """

    share: float

    def placed(self, steps: int) -> tuple[int, ...]:
        """The computed steps of a run of a known length."""
        return place(steps, math.ceil(self.share * steps))

    def computes(self, step: int, last: int, steps: int | None, begun: int = 0) -> bool:
        if steps is None:
            return True  # nobody planned for it
        planned = [begun + each for each in self.placed(steps - begun)] if steps > begun else []
        return _due(planned, step, last, steps)

    def check(self, steps: int) -> None:
        return None


def _due(planned: Sequence[int], step: int, last: int, steps: int) -> bool:
    """Whether a step is to be computed. planned: the run's computed ones; last: the newest."""
    if step >= steps:
        return True  # nobody planned for it
    following = [each for each in planned if each > last]
    # An estimate that changes from step to step must not stretch a gap: what counts is the
    # distance from the newest computed step.
    return bool(following) and step >= following[0]


def parse_schedule(value: Any, preset: str) -> Schedule:
    """The schedule that an option describes (see `PadeOptions.schedule`)."""
    if value == "auto":
        return Auto(PRESETS[preset])
    if value == "full":
        return Full()
    if isinstance(value, Mapping):
        unknown = set(value) - {"interval", "warmup"}
        if unknown or "interval" not in value:
            raise OptionError(
                f"schedule {dict(value)} has to be {{'interval': N}} or "
                "{'interval': N, 'warmup': W}"
            )
        return Interval(**value)
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value):
        return Listed(tuple(value))
    raise OptionError(
        f"schedule {value!r} is none of 'auto', 'full', {{'interval': N, 'warmup': W}} and a "
        "list of steps"
    )
