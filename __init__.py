"""accel: graph-level compiler passes that make generative models fast.

    torch.compile(model, backend="accel")

needs no import of this package; the names below are for reading what it did and for guiding it.
"""

from .compiler.export import Engine, export, load
from .compiler.gate import Gate
from .compiler.options import OmniSparseOptions, Options, PadeOptions
from .compiler.report import Report, Stats, explain, report_of, stats, trajectory
from .kernels.errors import AccelError, EngineError, ExportError, OptionError
from .kernels.omnisparse import omnisparse_attention

__all__ = [
    "AccelError",
    "Engine",
    "EngineError",
    "ExportError",
    "Gate",
    "OmniSparseOptions",
    "OptionError",
    "Options",
    "PadeOptions",
    "Report",
    "Stats",
    "explain",
    "export",
    "load",
    "omnisparse_attention",
    "report_of",
    "stats",
    "trajectory",
]

__version__ = "0.1.0"
