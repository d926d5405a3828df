"""The ZipAR pass: decode steps write where a schedule says, and the schedule of a picture."""

from .rewrite import CacheState, ZipARPass, write

__all__ = ["CacheState", "ZipARPass", "write"]
