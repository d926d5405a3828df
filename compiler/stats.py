"""What `accel.stats` returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..kernels.omnisparse.selection import SelectionSummary

__all__ = ["Stats"]


@dataclass(frozen=True)
class Stats:
    """What a compiled model has done so far.

    full_steps, predicted_steps: calls that ran the blocks, and that predicted instead.
    repeated_steps: those of them with exactly the inputs of an earlier one.
    untrusted_steps: computed because the history was not finite or the error above `max_error`.
    gated_steps: computed because the gate said so.
    nonfinite_steps: computed steps with NaN or Inf in the residual; kept out of the history.
    corrected_steps: computed steps that gave back what predicted ones before them had missed; none
        where it is not known what the sampler makes of outputs, as with those of higher order.
    calibrated_steps: calls that followed the model's profile. uncalibrated: those that did not, by
        why; none of either without a profile.
    runs: sampling runs begun: samples that nothing known explains, or first calls of explicit runs
        and of each of their named branches. forks: steps from which a run went on in a second way.
        siblings: evaluations of a sample beside others (guidance).
    roots: calls without a state to continue, by why. unmatched_calls: those of them that were in a
        run that is known, but in no branch that is.
    weight_changes: times that weights were found changed; all state was then dropped.
    largest_accepted, smallest_refused: what the fit of a sample to its run left, in expected
        rounding errors, where it was taken for a proof and where it was not.
    host_reads: calls for which a device had to be waited for, once each.
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
    corrected_steps: int = 0
    calibrated_steps: int = 0
    uncalibrated: dict[str, int] = field(default_factory=dict)
    runs: int = 0
    forks: int = 0
    siblings: int = 0
    roots: dict[str, int] = field(default_factory=dict)
    unmatched_calls: int = 0
    weight_changes: int = 0
    largest_accepted: float = 0.0
    smallest_refused: float = float("inf")
    host_reads: int = 0
    recompiles: int = 0
    state_bytes: int = 0
    last_error: float = float("nan")
    attention: tuple[SelectionSummary, ...] = ()
