"""DoRA checkpoints without a deep-learning framework: the extra ``[checkpoint]``.

Reading and writing adapters, and merging them into models of any size, tensor by tensor.
"""

from doraxp.checkpoint._adapters import AdapterSet
from doraxp.checkpoint._formats import load_adapters, save_adapters
from doraxp.checkpoint._inspect import Against, Factored, look_at, look_at_base
from doraxp.checkpoint._merge import Merge, plan_merge, run_merge
from doraxp.checkpoint._model import Model, open_model
from doraxp.checkpoint._rows import Change
from doraxp.checkpoint._safetensors import CheckpointError
from doraxp.checkpoint._shard import Options
from doraxp.layers import AdaptedLayer

__all__ = [
    "AdaptedLayer",
    "AdapterSet",
    "Against",
    "Change",
    "CheckpointError",
    "Factored",
    "Merge",
    "Model",
    "Options",
    "load_adapters",
    "look_at",
    "look_at_base",
    "open_model",
    "plan_merge",
    "run_merge",
    "save_adapters",
]
