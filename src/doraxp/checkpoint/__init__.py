"""Files of adapters and models, without a deep-learning framework: the extra ``[checkpoint]``.

It reads and writes adapters, and merges them into models of any size, tensor by tensor.
"""

from doraxp._base.extras import require

require("checkpoint", "safetensors", "ml_dtypes", "threadpoolctl", of="doraxp.checkpoint")

from doraxp.checkpoint._adapters import AdapterSet, algorithm_of
from doraxp.checkpoint._audit import audit
from doraxp.checkpoint._audit_weight import Verdict
from doraxp.checkpoint._change import Change
from doraxp.checkpoint._doctor import diagnose
from doraxp.checkpoint._doctor_report import Cost, DiagnosedModule, Diagnosis, Finding
from doraxp.checkpoint._doctor_rows import RowCounts
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._extract_merge import approximate
from doraxp.checkpoint._extract_model import Closeness, Extraction, extract
from doraxp.checkpoint._fit import Fit
from doraxp.checkpoint._formats import load_adapters
from doraxp.checkpoint._inspect import Against, Factored, look_at, look_at_base
from doraxp.checkpoint._load_quantised import load_quantised
from doraxp.checkpoint._merge import Merge, Weighted, plan_merge
from doraxp.checkpoint._merged_files import check_merge_files
from doraxp.checkpoint._model import Model, open_model
from doraxp.checkpoint._options import Options
from doraxp.checkpoint._quantised.reader import quantised_as
from doraxp.checkpoint._run import run_merge
from doraxp.checkpoint._sampled_norms import SampledNorms, sample_norms
from doraxp.checkpoint._save import check_place, named_for, save_adapters
from doraxp.checkpoint._target import check_target
from doraxp.checkpoint._tasks import (
    CopiedTensor,
    JoinedTensor,
    MergedTensor,
    ReplacedTensor,
    SummedTensor,
    merged_in,
    parts_of,
)
from doraxp.checkpoint._training import Training, load_training, save_training
from doraxp.checkpoint._updated_layer import UpdatedLayer
from doraxp.layers import AdaptedLayer

__all__ = [
    "AdaptedLayer",
    "AdapterSet",
    "Against",
    "Change",
    "CheckpointError",
    "Closeness",
    "CopiedTensor",
    "Cost",
    "DiagnosedModule",
    "Diagnosis",
    "Extraction",
    "Factored",
    "Finding",
    "Fit",
    "JoinedTensor",
    "Merge",
    "MergedTensor",
    "Model",
    "Options",
    "ReplacedTensor",
    "RowCounts",
    "SampledNorms",
    "SummedTensor",
    "Training",
    "UpdatedLayer",
    "Verdict",
    "Weighted",
    "algorithm_of",
    "approximate",
    "audit",
    "check_merge_files",
    "check_place",
    "check_target",
    "diagnose",
    "extract",
    "load_adapters",
    "load_quantised",
    "load_training",
    "look_at",
    "look_at_base",
    "merged_in",
    "named_for",
    "open_model",
    "parts_of",
    "plan_merge",
    "quantised_as",
    "run_merge",
    "sample_norms",
    "save_adapters",
    "save_training",
]
