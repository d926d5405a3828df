"""The Padé pass: a skip branch around the block stack of a diffusion transformer."""

from .rewrite import PadePass, StackState, StreamState

__all__ = ["PadePass", "StackState", "StreamState"]
