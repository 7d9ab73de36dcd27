"""DoRA, weight-decomposed low-rank adaptation, for the Python array API (arXiv:2402.09353)."""

from doraxp import backends
from doraxp._types import Adapter, Config, Gradients
from doraxp.decomposition import (
    MagnitudeDirectionChange,
    Prepared,
    decompose,
    magnitude_direction_change,
    prepare,
)
from doraxp.linear import Cache, backward, convert_form, forward, init, merge

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Cache",
    "Config",
    "Gradients",
    "MagnitudeDirectionChange",
    "Prepared",
    "backends",
    "backward",
    "convert_form",
    "decompose",
    "forward",
    "init",
    "magnitude_direction_change",
    "merge",
    "prepare",
]
