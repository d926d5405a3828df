"""OmniSparse attention: which keys and queries matter, and attention over them."""

from .op import DEVICES, observe_selections, omnisparse_attention
from .selection import Choice, Selection

__all__ = ["DEVICES", "Choice", "Selection", "observe_selections", "omnisparse_attention"]
