"""The errors that accel raises on purpose. All are `AccelError`."""

__all__ = ["AccelError", "MissingDependencyError", "OptionError", "VerificationError"]


class AccelError(Exception):
    """Root of every error that accel raises on purpose."""


class OptionError(AccelError, ValueError):
    """An option is unknown, malformed or contradicts another."""


class MissingDependencyError(AccelError, ImportError):
    """An optional package is needed; the message names the `pip install` line."""


class VerificationError(AccelError):
    """A pass produced a graph that breaks an invariant. Always a bug in accel: please report."""
