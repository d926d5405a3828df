"""The OmniSparse pass: attention over long sequences looks only where it matters."""

from .rewrite import OmniSparsePass

__all__ = ["OmniSparsePass"]
