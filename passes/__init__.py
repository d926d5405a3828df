"""The passes: each a folder or a file with one job. `PASSES` is all of them, in their order."""

from .base import Added, Constants, Feature, Pass, PassResult, Program, Reason, Skip, Slot, State
from .codebook import CodebookPass, SingleQueryPass
from .graph.verify import verify
from .omnisparse import OmniSparsePass
from .outline import OutlinePass
from .pade import PadePass, StackState

__all__ = [
    "PASSES",
    "Added",
    "CodebookPass",
    "Constants",
    "Feature",
    "OmniSparsePass",
    "OutlinePass",
    "PadePass",
    "Pass",
    "PassResult",
    "Program",
    "Reason",
    "SingleQueryPass",
    "Skip",
    "Slot",
    "StackState",
    "State",
    "verify",
]

# Tables come first, as they leave less to do; then attention, while all of it is in one graph.
# Outlining comes late: the others read single operations, which it hides in subgraphs. What comes
# after it is for graphs that call none.
PASSES: tuple[type[Pass], ...] = (
    CodebookPass, OmniSparsePass, PadePass, OutlinePass, SingleQueryPass,
)  # fmt: skip
