"""accel: graph-level compiler passes that make generative models fast.

    torch.compile(model, backend="accel")

needs no import of this package; the names below are for reading what it did and for guiding it.
"""

from typing import TYPE_CHECKING, Any

from .compiler import __version__ as __version__
from .compiler.calibration import calibrate
from .compiler.export import Engine, export, load
from .compiler.models.pipelines import accelerate, release
from .compiler.models.solid import Dynamics, Recommender, dynamize
from .compiler.models.visual_span import visual_span
from .compiler.options import Options
from .compiler.report import Report, Stats, explain, refresh, report_of, stats, trajectory
from .kernels.errors import AccelError, EngineError, ExportError, OptionError
from .kernels.omnisparse import observe_selections, omnisparse_attention
from .passes import OmniSparsePass as OmniSparseOptions
from .passes import PadePass as PadeOptions
from .passes.pade.forecast import Profile
from .passes.pade.gate import Gate

if TYPE_CHECKING:
    from .compiler.models.slim_cache import SlimCache
    from .compiler.models.zipar import ZipAR

__all__ = [
    "AccelError",
    "Dynamics",
    "Engine",
    "EngineError",
    "ExportError",
    "Gate",
    "OmniSparseOptions",
    "OptionError",
    "Options",
    "PadeOptions",
    "Profile",
    "Recommender",
    "Report",
    "SlimCache",
    "Stats",
    "ZipAR",
    "accelerate",
    "calibrate",
    "dynamize",
    "explain",
    "export",
    "load",
    "observe_selections",
    "omnisparse_attention",
    "refresh",
    "release",
    "report_of",
    "stats",
    "trajectory",
    "visual_span",
]


# Where the names are that build on transformers, which importing accel does not need.
_ON_TRANSFORMERS = {"SlimCache": ".compiler.models.slim_cache", "ZipAR": ".compiler.models.zipar"}


def __getattr__(name: str) -> Any:
    if name not in _ON_TRANSFORMERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    from .compiler.extras import optional

    optional("transformers", "transformers")
    return getattr(import_module(_ON_TRANSFORMERS[name], __name__), name)
