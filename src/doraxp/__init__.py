"""DoRA, weight-decomposed low-rank adaptation, for the Python array API (arXiv:2402.09353)."""

from doraxp import backends
from doraxp._base.types import Adapter, Config, Gradients, RowWeight
from doraxp._core.adapter import convert_form, init, merge
from doraxp._core.decomposition import (
    MagnitudeDirectionChange,
    decompose,
    magnitude_direction_change,
)
from doraxp._core.kinds import LayerKind
from doraxp._core.linear import backward, forward
from doraxp._core.matrix import Cache
from doraxp._core.operators import Convolution, Embedding, MatMul, Operator
from doraxp._core.prepared import Prepared, prepare
from doraxp._core.quantised import QuantisedWeight
from doraxp._core.updates import Difference, Hadamard, Kronecker, LowRank, UpdateAdapter
from doraxp.layers import (
    AdaptedLayer,
    AdaptedModel,
    Diagnostics,
    DoRALayer,
    Linear,
    adapt,
    adapt_layers,
)
from doraxp.optim import (
    SGD,
    AdamW,
    AdamWState,
    Optimizer,
    Schedule,
    SGDState,
    adamw_init,
    adamw_step,
    clip_by_global_norm,
    constant_schedule,
    cosine_schedule,
    linear_schedule,
    optimizer_from_settings,
    scaled_gradients,
    sgd_init,
    sgd_step,
)

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "AdamW",
    "AdamWState",
    "AdaptedLayer",
    "AdaptedModel",
    "Adapter",
    "Cache",
    "Config",
    "Convolution",
    "Diagnostics",
    "Difference",
    "DoRALayer",
    "Embedding",
    "Gradients",
    "Hadamard",
    "Kronecker",
    "LayerKind",
    "Linear",
    "LowRank",
    "MagnitudeDirectionChange",
    "MatMul",
    "Operator",
    "Optimizer",
    "Prepared",
    "QuantisedWeight",
    "RowWeight",
    "SGDState",
    "Schedule",
    "UpdateAdapter",
    "adamw_init",
    "adamw_step",
    "adapt",
    "adapt_layers",
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
    "optimizer_from_settings",
    "prepare",
    "scaled_gradients",
    "sgd_init",
    "sgd_step",
]
