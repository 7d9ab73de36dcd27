"""Layers with a state, and adapters for whole models."""

from doraxp.layers._adapt import AdaptedLayer, adapt
from doraxp.layers._dora import Diagnostics, DoRALayer
from doraxp.layers._linear import Linear

__all__ = ["AdaptedLayer", "Diagnostics", "DoRALayer", "Linear", "adapt"]
