"""Compare "all-linear" with PEFT's, on each class of transformers with its usual configuration.

    python docs/figures/all_linear.py

PEFT knows the classes of modules; doraxp is given names and shapes. The models are made on the
device "meta", so they take no memory. It runs for two minutes and needs PEFT and transformers.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import peft
import torch
import transformers
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from transformers.models.auto import modeling_auto

from doraxp.layers import find_targets

CLASSIFIERS = ("classifier", "score", "head")
SECONDS = 40


def models() -> Iterator[Any]:
    """Yield a model of each class that can be made without more packages or arguments."""
    names = {
        name
        for table in dir(modeling_auto)
        if table.endswith("MAPPING_NAMES")
        for entry in getattr(modeling_auto, table).values()
        for name in ((entry,) if isinstance(entry, str) else entry)
    }
    for name in sorted(names):
        with contextlib.suppress(Exception), torch.device("meta"):
            signal.alarm(SECONDS)
            one = getattr(transformers, name)
            config = one.config_class()
            for part in (config, *vars(config).values()):
                if isinstance(part, transformers.PretrainedConfig) and not getattr(
                    part, "layer_types", None
                ):
                    with contextlib.suppress(Exception):
                        part.num_hidden_layers = min(part.num_hidden_layers, 4)
            yield one(config)


def main() -> int:
    """Print the counts of modules."""

    def stop(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    counts: Counter[str] = Counter()
    for model in models():
        signal.alarm(0)
        lora = peft.LoraConfig(target_modules="all-linear")
        wanted = set(_maybe_include_all_linear_layers(lora, model).target_modules)
        found = find_targets(dict(model.named_parameters(remove_duplicate=False)), "all-linear")
        counts["classes"] += 1
        for path, module in model.named_modules():
            if getattr(getattr(module, "weight", None), "ndim", 0) != 2:
                continue
            if path in wanted:
                counts["linear in PEFT"] += 1
                if path in found.left_out:
                    why = found.left_out[path].partition(" ")[0]
                    why = "classifier" if path in CLASSIFIERS else why
                    counts[f"  left out as {why}"] += 1
            elif isinstance(module, torch.nn.Embedding | torch.nn.Linear):
                counts["embedding or output head in PEFT"] += 1
                counts["  taken as linear"] += path in found.paths
    for name, count in counts.items():
        print(f"{name:40} {count:>9,}")
    return 0


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    sys.exit(main())
