"""SOLID: recommenders whose layers' parameters are generated from a user's behaviour."""

from __future__ import annotations

from .dynamize import DynamicModel, Dynamics, dynamize
from .serving import Recommender

__all__ = ["DynamicModel", "Dynamics", "Recommender", "dynamize"]
