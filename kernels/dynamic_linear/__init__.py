"""A linear layer whose matrix is a mixture of each row's own."""

from .op import dynamic_linear

__all__ = ["dynamic_linear"]
