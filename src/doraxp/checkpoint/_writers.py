"""What PEFT's and mlx-lm's files hold; a ValueError where they cannot hold an adapter exactly."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from doraxp._base.types import Array, Config
from doraxp.checkpoint._peft import PREFIX
from doraxp.layers import AdaptedLayer

Written = tuple[dict[str, Array], dict[str, Any]]
"""The tensors, and the configuration."""


def to_peft(adapters: Mapping[str, AdaptedLayer]) -> Written:
    """Return what PEFT reads as these adapters."""
    tensors = {}
    for path, layer in adapters.items():
        kind = layer.kind.name
        if layer.kind.groups > 1 or kind in ("experts", "columns"):
            raise ValueError(f"{path}: PEFT has no DoRA adapter of this kind, {layer.kind}")
        _check_form(path, layer, "PEFT")
        a, b, m = layer.adapter
        names = ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"]
        if kind == "conv":
            ones = (1,) * (len(layer.shape) - 2)
            a = a.reshape(layer.config.rank, *layer.shape[1:])
            b, m = b.reshape(*b.shape, *ones), m.reshape(1, -1, *ones)
        elif kind == "embedding":
            names[:2] = "lora_embedding_A", "lora_embedding_B"
        for name, array in zip(names, (a, b, m), strict=True):
            tensors[f"{PREFIX}{path}.{name}"] = array
    configs = {path: layer.config for path, layer in adapters.items()}
    first, *others = configs.values()
    if any(config.rslora != first.rslora for config in others):
        raise ValueError("PEFT has one use_rslora for all modules, but these differ")
    # A key is matched against the end of a path; ^ keeps it from ending another one.
    keys = {path: f"^{re.escape(path)}" for path in configs}
    ranks = {keys[path]: config.rank for path, config in configs.items()}
    alphas = {keys[path]: _alpha(config) for path, config in configs.items()}
    return tensors, {
        "peft_type": "LORA",
        "use_dora": True,
        "use_rslora": first.rslora,
        "r": first.rank,
        "lora_alpha": _alpha(first),
        "rank_pattern": {key: rank for key, rank in ranks.items() if rank != first.rank},
        "alpha_pattern": {key: alpha for key, alpha in alphas.items() if alpha != _alpha(first)},
        "target_modules": sorted(configs),
        "fan_in_fan_out": any(layer.kind.name == "transposed" for layer in adapters.values()),
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
        "task_type": None,
        "base_model_name_or_path": None,
    }


def to_mlx(adapters: Mapping[str, AdaptedLayer]) -> Written:
    """Return what mlx-lm reads as these adapters."""
    tensors: dict[str, Array] = {}
    (first_path, first), *_ = adapters.items()
    rank, scale = first.config.rank, first.config.scaling
    for path, layer in adapters.items():
        if layer.kind.name != "linear":
            raise ValueError(
                f"{path}: mlx-lm has no DoRA adapter of kind {layer.kind.name!r} with a magnitude "
                "for each output"
            )
        _check_form(path, layer, "mlx-lm")
        config = layer.config
        if (config.rank, config.scaling) != (rank, scale):
            raise ValueError(
                f"mlx-lm has one rank and one s for all modules, but {first_path} has {rank} and "
                f"{scale}, {path} {config.rank} and {config.scaling}"
            )
        a, b, m = layer.adapter
        tensors |= {f"{path}.lora_a": a.T, f"{path}.lora_b": b.T, f"{path}.m": m}
    if Config(rank, rank * scale).scaling != scale:
        raise ValueError(f"s = {scale} is no longer the same after rank * s / rank")
    keys = {re.sub(r"^.*?\.layers\.\d+\.", "", f".{path}").lstrip(".") for path in adapters}
    return tensors, {
        "fine_tune_type": "dora",
        # Of all blocks: it counts from the last, and those without an adapter get one that is 0.
        "num_layers": -1,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": sorted(keys)},
    }


def _check_form(path: str, layer: AdaptedLayer, target: str) -> None:
    if layer.config.form != "weight":
        raise ValueError(
            f"{path}: {target} has the weight form only; doraxp.convert_form goes there, with the "
            "base weight"
        )


def _alpha(config: Config) -> float:
    alpha = config.rank if config.alpha is None or config.alpha < 0 else config.alpha
    return int(alpha) if alpha == int(alpha) else alpha
