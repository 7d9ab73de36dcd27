"""Layers with a state, and fresh adapters for the weights of a model."""

from doraxp.layers._adapt import AdaptedLayer, adapt
from doraxp.layers._adapt_layers import adapt_layers
from doraxp.layers._dora import Diagnostics, DoRALayer
from doraxp.layers._linear import Linear
from doraxp.layers._model import AdaptedModel
from doraxp.layers._targets import Targets, find_targets

__all__ = [
    "AdaptedLayer",
    "AdaptedModel",
    "Diagnostics",
    "DoRALayer",
    "Linear",
    "Targets",
    "adapt",
    "adapt_layers",
    "find_targets",
]
