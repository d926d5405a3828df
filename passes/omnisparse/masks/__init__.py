"""What attention masks hide, proven from the graph that makes them."""

from .read import Mask, read_mask

__all__ = ["Mask", "read_mask"]
