"""What `accel.stats` returns."""

from __future__ import annotations

from dataclasses import dataclass

from ..kernels.omnisparse.selection import SelectionSummary

__all__ = ["Stats"]


@dataclass(frozen=True)
class Stats:
    """What a compiled model has done so far.

    full_steps, predicted_steps: calls that ran the blocks, and that predicted instead.
    repeated_steps: calls with exactly the inputs of the one before.
    untrusted_steps: computed because the history was not finite or the error above `max_error`.
    gated_steps: computed because the gate said so.
    nonfinite_steps: computed steps with NaN or Inf in the residual; kept out of the history.
    runs: sampling runs begun. unmatched_calls: calls that looked like no known run although their
        conditions were known; each began a run of its own.
    recompiles: graphs compiled again for other shapes or settings (not those of a graph break).
    state_bytes: held now.
    last_error: relative error that the prediction would have had at the last computed step.
    attention: what each sparse attention selected, in the last call of each graph.
    """

    full_steps: int = 0
    predicted_steps: int = 0
    repeated_steps: int = 0
    untrusted_steps: int = 0
    gated_steps: int = 0
    nonfinite_steps: int = 0
    runs: int = 0
    unmatched_calls: int = 0
    recompiles: int = 0
    state_bytes: int = 0
    last_error: float = float("nan")
    attention: tuple[SelectionSummary, ...] = ()
