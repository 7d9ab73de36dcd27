"""Layers with a state, and fresh adapters for the weights of a model."""

from doraxp.layers._adapt import AdaptedLayer, adapt
from doraxp.layers._dora import Diagnostics, DoRALayer
from doraxp.layers._linear import Linear
from doraxp.layers._targets import Targets, find_targets

__all__ = ["AdaptedLayer", "Diagnostics", "DoRALayer", "Linear", "Targets", "adapt", "find_targets"]
