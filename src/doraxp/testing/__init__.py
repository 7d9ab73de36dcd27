"""The yardstick: named cases with their reasons, a float64 reference, and bounds for rounding."""

from doraxp.testing._catalogue import VERSION, Case, OptimizerCase, catalogue, optimizer_catalogue
from doraxp.testing._compare import Agreement, Comparison, Figure, compare_backends

__all__ = [
    "VERSION",
    "Agreement",
    "Case",
    "Comparison",
    "Figure",
    "OptimizerCase",
    "catalogue",
    "compare_backends",
    "optimizer_catalogue",
]
