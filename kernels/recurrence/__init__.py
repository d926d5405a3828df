"""The states of a GRU whose inputs' gates have been computed before."""

from .op import recurrence

__all__ = ["recurrence"]
