"""The search for a method's best steps to compute, on noise that is not measured on later."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

__all__ = ["best_placement", "family"]

GROWTHS = (1.0, 1.25, 1.5, 1.75)
ENDS = (0.85, 0.95, 1.0)


def family(steps: int, computed: int) -> Iterator[tuple[int, ...]]:
    """Placements from even to crowded at the start, that end early or late; without repeats."""
    seen = set()
    for growth in (1.5, *(each for each in GROWTHS if each != 1.5)):
        for end in ENDS:
            chosen = [0]
            for index in range(1, computed):
                position = round(end * (steps - 1) * (index / (computed - 1)) ** growth)
                chosen.append(min(max(position, chosen[-1] + 1), steps - computed + index))
            placement = tuple(chosen)
            if placement not in seen:
                seen.add(placement)
                yield placement


def best_placement(
    steps: int,
    starts: Sequence[Sequence[int]],
    fidelity: Callable[[Sequence[int]], float],
    sweeps: int,
) -> tuple[tuple[int, ...], float]:
    """The best of `starts`, improved by moving single steps by one, up to `sweeps` times over.

    fidelity: what to maximise (mean PSNR, say).
    """
    known: dict[tuple[int, ...], float] = {}

    def value(placement: Iterable[int]) -> float:
        key = tuple(placement)
        if key not in known:
            known[key] = fidelity(key)
        return known[key]

    best = tuple(max(starts, key=value))
    for _ in range(sweeps):
        before = best
        for index in range(1, len(best)):
            for move in (-1, 1):
                moved = tuple(sorted({*best[:index], best[index] + move, *best[index + 1 :]}))
                if len(moved) == len(best) and moved[-1] < steps and value(moved) > value(best):
                    best = moved
        if best == before:
            break
    return best, value(best)
