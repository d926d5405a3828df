"""OmniSparse attention: which keys and queries matter, and attention over them."""

from .op import omnisparse_attention
from .selection import Choice, Selection

__all__ = ["Choice", "Selection", "omnisparse_attention"]
