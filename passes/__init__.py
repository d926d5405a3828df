"""The passes. Each is one file with one job; `PASSES` is the order in which they run."""

from .base import GraphPass, PassResult, Program, Reason, Skip
from .omnisparse import OmniSparsePass
from .outline import OutlinePass
from .pade import PadePass, StackState
from .verify import verify

__all__ = [
    "PASSES",
    "GraphPass",
    "OmniSparsePass",
    "OutlinePass",
    "PadePass",
    "PassResult",
    "Program",
    "Reason",
    "Skip",
    "StackState",
    "verify",
]

# Attention comes first, while all of it is in one graph. Outlining comes last: the others read
# single operations, which it hides in subgraphs.
PASSES = ("omnisparse", "pade", "outline")
