"""The passes. Each is one file with one job; `PASSES` is the order in which they run."""

from .base import GraphPass, PassResult, Program, Reason, Skip
from .codebook.rewrite import CodebookPass, Tables
from .graph.verify import verify
from .omnisparse.rewrite import OmniSparsePass
from .outline import OutlinePass
from .pade.rewrite import PadePass, StackState

__all__ = [
    "PASSES",
    "CodebookPass",
    "GraphPass",
    "OmniSparsePass",
    "OutlinePass",
    "PadePass",
    "PassResult",
    "Program",
    "Reason",
    "Skip",
    "StackState",
    "Tables",
    "verify",
]

# Tables come first, as they leave less to do; then attention, while all of it is in one graph.
# Outlining comes last: the others read single operations, which it hides in subgraphs.
PASSES = ("codebook", "omnisparse", "pade", "outline")
