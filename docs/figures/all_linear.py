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


def by_shape(model: Any, wanted: set[str], counts: Counter[str]) -> None:
    """Count the vocabularies that are found by their shapes: each name is hidden."""
    shown, names = {}, {}
    for number, (name, one) in enumerate(model.named_parameters(remove_duplicate=False)):
        if name.endswith(".weight"):
            is_inside = any(part.isdecimal() for part in name.split("."))
            path = f"{'0.' if is_inside else ''}m{number}"
            shown[f"{path}.weight"], names[path] = one, name.removesuffix(".weight")
    found = find_targets(shown, "all-linear").left_out
    modules = dict(model.named_modules())
    for path, name in names.items():
        is_target = name in wanted
        counts["without names: targets of PEFT left out"] += is_target and path in found
        is_known = isinstance(modules[name], torch.nn.Embedding | torch.nn.Linear)
        weight = shown[f"{path}.weight"]
        if is_known and not is_target and weight.ndim == 2 and weight.shape[0] >= 20_000:
            counts["vocabularies of 20,000 rows and more"] += 1
            counts["  found without names"] += path in found


def main() -> int:
    """Print the counts of modules."""

    def stop(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    counts, hidden = Counter[str](), Counter[str]()
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
        by_shape(model, wanted, hidden)
    for name, count in (counts | hidden).items():
        print(f"{name:40} {count:>9,}")
    return 0


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    sys.exit(main())
