"""The yardstick: named cases with their reasons, a float64 reference, and bounds for rounding."""

from doraxp.testing._catalogue import VERSION, Case, OptimizerCase, catalogue, optimizer_catalogue
from doraxp.testing._compare import Agreement, Comparison, Figure, compare_backends
from doraxp.testing._conventions import Conventions
from doraxp.testing._diagnosis import Diagnosis
from doraxp.testing._implementation import Finding, Report, check_implementation

__all__ = [
    "VERSION",
    "Agreement",
    "Case",
    "Comparison",
    "Conventions",
    "Diagnosis",
    "Figure",
    "Finding",
    "OptimizerCase",
    "Report",
    "catalogue",
    "check_implementation",
    "compare_backends",
    "optimizer_catalogue",
]
