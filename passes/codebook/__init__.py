"""The codebook pass: what depends on an id alone becomes a table with a row for each id. What is
left is short, which a second pass makes use of."""

from .rewrite import CodebookPass
from .single_query import SingleQueryPass

__all__ = ["CodebookPass", "SingleQueryPass"]
