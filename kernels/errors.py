"""The errors that accel raises on purpose. All are `AccelError`."""

__all__ = [
    "AccelError",
    "EngineError",
    "ExportError",
    "MissingDependencyError",
    "OptionError",
    "VerificationError",
    "first_line",
]


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line; its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class AccelError(Exception):
    """Root of every error that accel raises on purpose."""


class OptionError(AccelError, ValueError):
    """An option is unknown, malformed or contradicts another."""


class EngineError(AccelError, ValueError):
    """An engine file can't be loaded, or an engine got inputs that it was not built for."""


class ExportError(AccelError):
    """A model can't be exported, or not with what was asked for."""


class MissingDependencyError(AccelError, ImportError):
    """An optional package is needed; the message names the `pip install` line."""


class VerificationError(AccelError):
    """A pass produced a graph that breaks an invariant. Always a bug in accel: please report."""
