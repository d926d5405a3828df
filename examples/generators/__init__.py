"""Small generators of different kinds, trained by us on real data, to judge forecasts on.

README.md says what they are; `train` makes their checkpoints.
"""

from .base import Generator
from .dit import Dit
from .flux import Flux
from .pixart import PixArt
from .wan import Wan

__all__ = ["GENERATORS"]

GENERATORS: dict[str, Generator] = {each.name: each for each in (Flux(), PixArt(), Dit(), Wan())}
