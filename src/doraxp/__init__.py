"""DoRA, weight-decomposed low-rank adaptation, for the Python array API (arXiv:2402.09353)."""

from doraxp import backends
from doraxp._types import Adapter, Config, Gradients
from doraxp.adaptation import AdaptedLayer, adapt
from doraxp.adapted import Prepared, prepare
from doraxp.decomposition import (
    MagnitudeDirectionChange,
    decompose,
    magnitude_direction_change,
)
from doraxp.kinds import LayerKind
from doraxp.layer import Diagnostics, DoRALayer, Linear
from doraxp.linear import Cache, backward, convert_form, forward, init, merge
from doraxp.optimizers import (
    AdamWState,
    SGDState,
    adamw_init,
    adamw_step,
    clip_by_global_norm,
    sgd_init,
    sgd_step,
)
from doraxp.schedules import constant_schedule, cosine_schedule, linear_schedule

__version__ = "0.1.0"

__all__ = [
    "AdamWState",
    "AdaptedLayer",
    "Adapter",
    "Cache",
    "Config",
    "Diagnostics",
    "DoRALayer",
    "Gradients",
    "LayerKind",
    "Linear",
    "MagnitudeDirectionChange",
    "Prepared",
    "SGDState",
    "adamw_init",
    "adamw_step",
    "adapt",
    "backends",
    "backward",
    "clip_by_global_norm",
    "constant_schedule",
    "convert_form",
    "cosine_schedule",
    "decompose",
    "forward",
    "init",
    "linear_schedule",
    "magnitude_direction_change",
    "merge",
    "prepare",
    "sgd_init",
    "sgd_step",
]
