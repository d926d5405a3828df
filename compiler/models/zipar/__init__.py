"""Parallel decoding of pictures; `ZipAR` is the user's handle."""

from .handle import ZipAR

__all__ = ["ZipAR"]
