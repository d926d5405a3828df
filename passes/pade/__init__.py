"""The Padé pass: a skip branch around the block stack of a diffusion transformer."""

from .padepass import PadePass
from .state import StackState, StreamState

__all__ = ["PadePass", "StackState", "StreamState"]
