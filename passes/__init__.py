"""The passes: each a folder or a file with one job. `PASSES` is all of them, in their order."""

from .base import Added, Constants, Feature, Pass, PassResult, Program, Reason, Skip, Slot, State
from .codebook import CodebookPass, SingleQueryPass
from .fuse_projections import FuseProjectionsPass
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
    "FuseProjectionsPass",
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

# Tables come first, as they leave less to do. Then projections: their fused weights have to be
# inputs by the time that a branch or a subgraph takes blocks in. Then attention, while all of it is
# in one graph. Outlining comes late: the others read single operations, which it hides in
# subgraphs. What comes after it is for graphs that call none.
PASSES: tuple[type[Pass], ...] = (
    CodebookPass, FuseProjectionsPass, OmniSparsePass, PadePass, OutlinePass, SingleQueryPass,
)  # fmt: skip
