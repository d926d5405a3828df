"""Drawings of what was measured."""

from __future__ import annotations

from pathlib import Path

from ..passes.pade.forecast import Profile
from .extras import optional

__all__ = ["draw_profile"]


def draw_profile(profile: Profile, path: Path) -> None:
    """Fidelity over speed: what was measured on held-out noise, and what `min_psnr` goes by.

    path: of the picture; its suffix says the format. Raises MissingDependencyError without
    matplotlib.
    """
    optional("matplotlib", "examples")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    speeds = [profile.speed(point) for point in profile.points]
    measured = [point.psnr for point in profile.points]
    promised = [point.psnr - (point.error or 0.0) for point in profile.points]
    axes.plot(speeds, measured, "o-", label="measured, mean of the samples")
    axes.plot(speeds, promised, "--", label="what min_psnr goes by (less a standard error)")
    for point, speed, decibels in zip(profile.points, speeds, measured, strict=True):
        axes.annotate(
            str(len(point.computed)), (speed, decibels), textcoords="offset points", xytext=(4, 4)
        )
    axes.set_xlabel(
        f"times faster than all {profile.steps} steps (number of computed steps beside)"
    )
    axes.set_ylabel("PSNR to the full run, dB")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
