"""The search for a method's best steps to compute, on noise that is not measured on later."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

__all__ = ["best_placement", "family"]

GROWTHS = (0.9, 1.0, 1.1, 1.25, 1.5)
ENDS = (0.8, 0.85, 0.9, 0.95, 1.0)


def family(steps: int, computed: int) -> Iterator[tuple[int, ...]]:
    """Placements from even to crowded at the start, that end early or late; without repeats."""
    seen = set()
    for end in ENDS:
        for growth in GROWTHS:
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
    computed: int,
    fidelity: Callable[[Sequence[int]], float],
    sweeps: int = 2,
) -> tuple[tuple[int, ...], float]:
    """The best of the family, improved by moving single steps by one, up to `sweeps` times over.

    fidelity: what to maximise (mean PSNR, say).
    """
    best, value = max(
        ((placement, fidelity(placement)) for placement in family(steps, computed)),
        key=lambda found: found[1],
    )
    for _ in range(sweeps):
        before = value
        for index in range(1, computed):
            for move in (-1, 1):
                moved = sorted({*best[:index], best[index] + move, *best[index + 1 :]})
                if len(moved) < computed or moved[-1] >= steps:
                    continue
                got = fidelity(moved)
                if got > value:
                    best, value = tuple(moved), got
        if value == before:
            break
    return best, value
