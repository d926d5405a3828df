"""OmniSparse attention: which keys and queries matter, and attention over them."""

from .op import omnisparse_attention
from .selection import Selection

__all__ = ["Selection", "omnisparse_attention"]
