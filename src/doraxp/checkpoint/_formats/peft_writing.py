"""PEFT's folders, the writing part: the tensors and ``adapter_config.json``.

A file of PEFT is copied: its whole tensors and the entries of its configuration stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from doraxp._base.types import Array, Config, HostArray
from doraxp.checkpoint._adapters import AdapterSet, config_path
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._formats.checks import check_weight_form
from doraxp.checkpoint._formats.embeddings import by_token
from doraxp.checkpoint._formats.protocol import Written
from doraxp.checkpoint._formats.whole import check_no_whole_tensors
from doraxp.checkpoint._json import JsonObject, read_json
from doraxp.checkpoint._low_rank import LowRankLayer, low_rank_layer
from doraxp.checkpoint._safetensors import DTYPES, Reader
from doraxp.checkpoint._updated_layer import AnyLayer

PREFIX = "base_model.model."
_COPIED = ("peft", "nvlabs")
# The entries of NVlabs' configuration that PEFT does not know.
_NVLABS = {"merge_weights", "enable_lora", "dora_simple", "Wdecompose_target_modules"}
_OTHER_DTYPES: dict[str, np.dtype[np.generic]] = {
    **{f"I{bits}": np.dtype(f"<i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"<u{bits // 8}") for bits in (8, 16, 32, 64)},
    "BOOL": np.dtype(np.bool_),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}


def write(adapters: Mapping[str, AnyLayer]) -> Written:
    """Return the tensors and the configuration that PEFT reads as these adapters."""
    tensors: dict[str, Array] = {}
    # An AdapterSet reads an adapter at each access.
    layers = {path: low_rank_layer(path, layer, "PEFT") for path, layer in adapters.items()}
    _check_alike(layers)
    for path, layer in layers.items():
        kind = layer.kind.name
        if layer.kind.groups > 1 or kind == "columns":
            raise ValueError(f"{path}: PEFT has no adapter of this kind, {layer.kind}")
        if kind == "linear" and by_token(adapters, path):
            raise ValueError(
                f"{path}: this adapter of an embedding has one magnitude for each token, and "
                "PEFT's has one for each dimension: merge it into its base instead, with "
                "doraxp merge"
            )
        check_weight_form(path, layer.config, "PEFT")
        a, b, m = layer[:3]
        names = ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"]
        if kind == "conv":
            ones = (1,) * (len(layer.shape) - 2)
            a = a.reshape(layer.config.rank, *layer.shape[1:])
            b = b.reshape(*b.shape, *ones)
            m = None if m is None else m.reshape(1, -1, *ones)
        elif layer.kind.is_stack:
            if len(layer.shape) != 3:
                raise ValueError(
                    f"{path}: a stack of experts must have one axis for them, got the shape "
                    f"{layer.shape}"
                )
        elif kind == "embedding":
            names[:2] = "lora_embedding_A", "lora_embedding_B"
        for name, array in zip(names, (a, b, m), strict=True):
            if array is not None:
                tensors[f"{PREFIX}{path}.{name}"] = array
    entries = _configuration(layers)
    if not isinstance(adapters, AdapterSet):
        return Written(tensors, entries, {})
    if adapters.format not in _COPIED:
        check_no_whole_tensors(adapters, "a PEFT file with new names of modules")
        return Written(tensors, entries | base_entries(adapters), {})
    reader = adapters.reader
    tensors |= {name: _whole(reader, own) for name, own in adapters.beside.items()}
    return Written(tensors, entries | _source_entries(adapters), reader.metadata)


def _whole(reader: Reader, name: str) -> HostArray:
    """Return a tensor of any dtype that NumPy has."""
    tensor = reader.tensors[name]
    if tensor.dtype in DTYPES:
        return reader.read(name)
    if tensor.dtype not in _OTHER_DTYPES:
        raise CheckpointError(
            f"{reader.path}: {name} has dtype {tensor.dtype}, which NumPy does not have: copy the "
            "folder with the tools of your system"
        )
    raw = b"".join(map(bytes, reader.chunks(name)))
    return np.frombuffer(raw, _OTHER_DTYPES[tensor.dtype]).reshape(tensor.shape)


def base_entries(adapters: AdapterSet) -> JsonObject:
    """Return the entries that tell of a base or of biases that the training changed."""
    return {
        "init_lora_weights": adapters.base_change or True,
        "bias": adapters.trained_biases or "none",
    }


def _source_entries(adapters: AdapterSet) -> JsonObject:
    """Return the entries of a PEFT file's configuration, as entries that PEFT knows."""
    config = read_json(config_path(adapters.reader))
    given = {name: value for name, value in config.items() if value is not None}
    if adapters.format == "nvlabs":
        given = {name: value for name, value in given.items() if name not in _NVLABS}
        given |= {"peft_type": "LORA", "use_dora": True}
    return given


def _check_alike(layers: Mapping[str, LowRankLayer]) -> None:
    """Raise ValueError where some modules are DoRA and others are LoRA."""
    without = [path for path, layer in layers.items() if layer.magnitude is None]
    if without and len(without) < len(layers):
        other = next(path for path, layer in layers.items() if layer.magnitude is not None)
        raise ValueError(
            f"PEFT has one use_dora for all modules, but {other} has a magnitude and {without[0]} "
            "has none: merge the adapter into its base instead, with doraxp merge"
        )


def _configuration(adapters: Mapping[str, LowRankLayer]) -> JsonObject:
    """Return the content of ``adapter_config.json``."""
    first_layer = next(iter(adapters.values()))
    configs = {path: layer.config for path, layer in adapters.items()}
    first, *others = configs.values()
    if any(config.rslora != first.rslora for config in others):
        raise ValueError("PEFT has one use_rslora for all modules, but these differ")
    stacks = sorted(path for path, layer in adapters.items() if layer.kind.is_stack)
    keys = {path: whole_path(path) for path in configs}
    ranks = {keys[path]: config.rank for path, config in configs.items()}
    alphas = {keys[path]: _alpha(config) for path, config in configs.items()}
    return {
        "peft_type": "LORA",
        "use_dora": first_layer.magnitude is not None,
        "use_rslora": first.rslora,
        "r": first.rank,
        "lora_alpha": _alpha(first),
        "rank_pattern": {key: rank for key, rank in ranks.items() if rank != first.rank},
        "alpha_pattern": {key: alpha for key, alpha in alphas.items() if alpha != _alpha(first)},
        "target_modules": sorted(path for path in configs if path not in stacks),
        **({"target_parameters": stacks} if stacks else {}),
        "fan_in_fan_out": any(layer.kind.name == "transposed" for layer in adapters.values()),
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
        "task_type": None,
        "base_model_name_or_path": None,
    }


def whole_path(path: str) -> str:
    """Return the pattern that matches this path alone.

    PEFT matches a key with the end of a path; ^ keeps it from matching the end of another one.
    """
    return f"^{re.escape(path)}"


def _alpha(config: Config) -> float:
    alpha = config.rank if config.alpha is None or config.alpha < 0 else config.alpha
    return int(alpha) if alpha == int(alpha) else alpha
