"""mlx-lm's folders: A is stored (in, rank), B (rank, out), m (out,); ``scale`` is s itself."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from doraxp._base.types import Array, Config
from doraxp._core.kinds import LayerKind
from doraxp.backends import transpose
from doraxp.checkpoint._adapters import AdapterSet, StoredLayer, config_path
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._formats.checks import (
    check_weight_form,
    checked_config,
    complete_names,
    names_by_module,
)
from doraxp.checkpoint._formats.protocol import Written
from doraxp.checkpoint._json import JsonObject, read_json
from doraxp.checkpoint._safetensors import Reader
from doraxp.layers import AdaptedLayer

NAME, FILE = "mlx", "adapters.safetensors"
_ENDS = {"lora_a": "a", "lora_b": "b", "m": "m"}


def recognises(parts: Collection[str]) -> bool:
    """Return True for names with mlx-lm's lower-case factors."""
    return "lora_a" in parts


def read(reader: Reader) -> AdapterSet:
    """Describe the adapters of an mlx-lm folder."""
    where = config_path(reader)
    parameters, scale = _parameters(read_json(where), where)
    layers = {}
    for path, parts in names_by_module(reader, _ENDS).items():
        names = complete_names(reader, path, parts)
        a, b, m = (reader.tensors[name].shape for name in names)
        if (len(a), len(b), len(m)) != (2, 2, 1) or a[1] != b[0]:
            raise CheckpointError(
                f"{reader.path}: {path}: lora_a must have shape (in, rank) and lora_b "
                f"(rank, out), got {a} and {b}"
            )
        if m == (a[0],) and m != (b[1],):
            raise CheckpointError(
                f"{reader.path}: {path} is an embedding with a magnitude for each token: it "
                "cannot be merged as the others are, and no other format has such magnitudes"
            )
        rank = a[1]
        if parameters.get("rank", rank) != rank:
            raise CheckpointError(
                f"{where}: {path}: rank is {parameters['rank']!r}, but lora_a has shape {a}"
            )
        own = checked_config(reader, path, rank, rank * scale)
        layers[path] = StoredLayer(own, LayerKind(), (b[1], a[0]), names, True)
    return AdapterSet(NAME, reader, layers)


def _parameters(config: JsonObject, where: Path) -> tuple[JsonObject, float]:
    """Return the ``lora_parameters`` of a configuration, and s."""
    if config.get("fine_tune_type") != "dora":
        raise CheckpointError(
            f"{where}: fine_tune_type must be 'dora', got {config.get('fine_tune_type')!r}"
        )
    parameters = config.get("lora_parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    scale = parameters.get("scale")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise CheckpointError(f"{where}: lora_parameters must have a scale above 0, got {scale!r}")
    return parameters, scale


def write(adapters: Mapping[str, AdaptedLayer]) -> Written:
    """Return the tensors and the configuration that mlx-lm reads as these adapters."""
    tensors: dict[str, Array] = {}
    (first_path, first), *_ = adapters.items()
    rank, scale = first.config.rank, first.config.scaling
    for path, layer in adapters.items():
        if layer.kind.name != "linear":
            raise ValueError(
                f"{path}: mlx-lm has no DoRA adapter of kind {layer.kind.name!r} with a magnitude "
                "for each output"
            )
        check_weight_form(path, layer, "mlx-lm")
        config = layer.config
        if (config.rank, config.scaling) != (rank, scale):
            raise ValueError(
                f"mlx-lm has one rank and one s for all modules, but {first_path} has rank {rank} "
                f"and s {scale}, and {path} has rank {config.rank} and s {config.scaling}"
            )
        a, b, m = layer.adapter
        tensors |= {f"{path}.lora_a": transpose(a), f"{path}.lora_b": transpose(b), f"{path}.m": m}
    if Config(rank, rank * scale).scaling != scale:
        raise ValueError(f"s = {scale} would not come back exactly: rank * s / rank differs")
    keys = {re.sub(r"^.*?\.layers\.\d+\.", "", f".{path}").lstrip(".") for path in adapters}
    return Written(
        tensors,
        {
            "fine_tune_type": "dora",
            # mlx-lm counts blocks from the last one; -1 stands for all of them. A block without
            # an adapter gets one whose update is 0.
            "num_layers": -1,
            "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": sorted(keys)},
        },
    )
