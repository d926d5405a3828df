"""The codebook pass: what depends on an id alone becomes a table with a row for each id."""

from .rewrite import CodebookPass, Tables

__all__ = ["CodebookPass", "Tables"]
