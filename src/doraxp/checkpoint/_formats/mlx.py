"""mlx-lm's folders: A is stored (in, rank), B (rank, out), m (out,); ``scale`` is s itself.

The file of an embedding has B as ``lora_a`` and A as ``lora_b``: see `embeddings`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from doraxp._base.types import Array, Config
from doraxp._core.kinds import LayerKind
from doraxp.checkpoint._adapters import CONFIG, AdapterSet, StoredLayer, config_path
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._expert_names import ExpertNames
from doraxp.checkpoint._formats.checks import (
    check_weight_form,
    checked_config,
    complete_names,
    names_by_module,
)
from doraxp.checkpoint._formats.embeddings import by_token, kind_by_name
from doraxp.checkpoint._formats.protocol import Written
from doraxp.checkpoint._formats.whole import check_adapters_only
from doraxp.checkpoint._json import JsonObject, read_json
from doraxp.checkpoint._low_rank import LowRankLayer, low_rank_layer
from doraxp.checkpoint._safetensors import Reader
from doraxp.checkpoint._update_names import TensorNames
from doraxp.checkpoint._updated_layer import AnyLayer

NAME, FILE = "mlx", "adapters.safetensors"
_ENTRY = "embeddings"
"""Of ``lora_parameters``: the modules that are embeddings. mlx-lm does not read it."""
_ENDS = {"lora_a": "a", "lora_b": "b", "m": "m"}


def recognises(reader: Reader, parts: Collection[str]) -> bool:
    """Return True for names with mlx-lm's lower-case factors."""
    return "lora_a" in parts


def read(reader: Reader) -> AdapterSet:
    """Describe the adapters of an mlx-lm folder."""
    where = config_path(reader)
    config = read_json(where)
    parameters, scale = _parameters(config, where)
    dora = config["fine_tune_type"] == "dora"
    listed = _listed_embeddings(parameters, where)
    layers = {}
    for path, parts in names_by_module(reader, _ENDS).items():
        names = complete_names(reader, path, parts)
        _check_magnitude(reader, path, names, dora=dora)
        a, b = (reader.tensors[name].shape for name in names[:2])
        if len(a) == len(b) == 3:
            layers[path] = _experts(reader, path, names, parameters, scale)
            continue
        if (len(a), len(b)) != (2, 2) or a[1] != b[0]:
            raise CheckpointError(
                f"{reader.path}: {path}: lora_a must have shape (in, rank) and lora_b "
                f"(rank, out), got {a} and {b}"
            )
        rank = a[1]
        if parameters.get("rank", rank) != rank:
            raise CheckpointError(
                f"{where}: {path}: rank is {parameters['rank']!r}, but lora_a has shape {a}"
            )
        own = checked_config(reader, path, rank, rank * scale)
        if _is_embedding(reader, path, names, listed):
            # The layer's A is lora_b, and its B is lora_a.
            swapped = names._replace(lora_a=names.lora_b, lora_b=names.lora_a)
            layers[path] = StoredLayer(own, LayerKind(), (a[0], b[1]), swapped)
        else:
            layers[path] = StoredLayer(own, LayerKind(), (b[1], a[0]), names, True)
    return AdapterSet(NAME, reader, layers, ties_weights=True)


def _experts(
    reader: Reader, path: str, names: TensorNames, parameters: JsonObject, scale: float
) -> StoredLayer:
    """Return the layer of experts, whose factors are stacks of A and B as they are."""
    a, b = (reader.tensors[name].shape for name in names[:2])
    (experts, rank, inner), out = a, b[1]
    if (experts, rank) != (b[0], b[2]) or 0 in (*a, *b) or names.magnitude is not None:
        raise CheckpointError(
            f"{reader.path}: {path}: lora_a of experts must have shape (experts, rank, in) and "
            f"lora_b (experts, out, rank), without m, got {a} and {b}"
        )
    if parameters.get("rank", rank) != rank:
        raise CheckpointError(
            f"{reader.path}: {path}: {CONFIG} says rank {parameters['rank']!r}, but lora_a has "
            f"shape {a}"
        )
    own = checked_config(reader, path, rank, rank * scale)
    kind = LayerKind("experts")
    return StoredLayer(
        own, kind, (experts, out, inner), ExpertNames(names.lora_a, names.lora_b, experts)
    )


def _check_magnitude(reader: Reader, path: str, names: TensorNames, *, dora: bool) -> None:
    """Raise CheckpointError unless a module has a magnitude where the configuration says DoRA."""
    if dora and names.magnitude is None:
        raise CheckpointError(
            f"{reader.path}: {path} has no magnitude, but {CONFIG} says fine_tune_type 'dora'"
        )
    if not dora and names.magnitude is not None:
        raise CheckpointError(
            f"{reader.path}: {path} has a magnitude, but {CONFIG} says fine_tune_type 'lora', so "
            "mlx-lm leaves it out: set it to 'dora' if DoRA was trained"
        )
    if names.magnitude is not None and len(reader.tensors[names.magnitude].shape) != 1:
        raise CheckpointError(f"{reader.path}: {names.magnitude} must have one axis")


def _is_embedding(
    reader: Reader, path: str, names: TensorNames, listed: Collection[str] | None
) -> bool:
    """Return True if a module is an embedding: by the list, the shapes, or else the name."""
    a, b = (reader.tensors[name].shape for name in names[:2])
    m = (b[1],) if names.magnitude is None else reader.tensors[names.magnitude].shape
    if listed is not None:
        if path not in listed and m == (a[0],) != (b[1],):
            raise CheckpointError(
                f"{reader.path}: {names.magnitude} has shape {m}, which is one number for each "
                f"token of an embedding, but {_ENTRY} of lora_parameters in {CONFIG} does not "
                f"have {path}: add it there"
            )
        return path in listed
    if a[0] != b[1]:  # without m, the base's shape tells the layer in which B A is transposed
        return m == (a[0],)
    kind = kind_by_name(path)
    if kind is None:
        raise CheckpointError(
            f"{reader.path}: {path} has a square weight {(b[1], a[0])}, and neither the name nor "
            "the shapes tell whether it is a linear layer or an embedding: add to lora_parameters "
            f'in {CONFIG} "{_ENTRY}": ["{path}"] if it is an embedding, and "{_ENTRY}": [] if not'
        )
    return kind == "embedding"


def _listed_embeddings(parameters: JsonObject, where: Path) -> Collection[str] | None:
    """Return the modules that the configuration lists as embeddings; None without a list."""
    listed = parameters.get(_ENTRY)
    if listed is None:
        return None
    if not isinstance(listed, list) or not all(isinstance(path, str) for path in listed):
        raise CheckpointError(
            f"{where}: {_ENTRY} of lora_parameters must be a list of modules, got {listed!r}"
        )
    return set(listed)


def _parameters(config: JsonObject, where: Path) -> tuple[JsonObject, float]:
    """Return the ``lora_parameters`` of a configuration, and s."""
    if config.get("fine_tune_type") not in ("dora", "lora"):
        raise CheckpointError(
            f"{where}: fine_tune_type must be 'dora' or 'lora', got "
            f"{config.get('fine_tune_type')!r}"
        )
    parameters = config.get("lora_parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    scale = parameters.get("scale")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise CheckpointError(f"{where}: lora_parameters must have a scale above 0, got {scale!r}")
    return parameters, scale


def write(adapters: Mapping[str, AnyLayer]) -> Written:
    """Return the tensors and the configuration that mlx-lm reads as these adapters."""
    check_adapters_only(adapters, "mlx-lm")
    tensors: dict[str, Array] = {}
    # An AdapterSet reads an adapter at each access.
    layers = {path: low_rank_layer(path, layer, "mlx-lm") for path, layer in adapters.items()}
    (first_path, first), *_ = layers.items()
    rank, scale = first.config.rank, first.config.scaling
    for path, layer in layers.items():
        if layer.kind.name != "linear":
            raise ValueError(
                f"{path}: mlx-lm has no adapter of kind {layer.kind.name!r} that is of its matrix: "
                "merge it into its base instead, with doraxp merge"
            )
        if (layer.magnitude is None) != (first.magnitude is None):
            raise ValueError(
                f"mlx-lm has one fine_tune_type for all modules, but only one of {first_path} and "
                f"{path} has a magnitude: merge it into its base instead, with doraxp merge"
            )
        check_weight_form(path, layer.config, "mlx-lm")
        config = layer.config
        if (config.rank, config.scaling) != (rank, scale):
            raise ValueError(
                f"mlx-lm has one rank and one s for all modules, but {first_path} has rank {rank} "
                f"and s {scale}, and {path} has rank {config.rank} and s {config.scaling}: merge "
                "the adapter into its base instead, with doraxp merge"
            )
        a, b, m = layer[:3]
        a, b = (b, a) if by_token(adapters, path) else (a.T, b.T)
        tensors |= {f"{path}.lora_a": a, f"{path}.lora_b": b}
        if m is not None:
            tensors[f"{path}.m"] = m
    if Config(rank, rank * scale).scaling != scale:
        raise ValueError(f"s = {scale} would not come back exactly: rank * s / rank differs")
    keys = {re.sub(r"^.*?\.layers\.\d+\.", "", f".{path}").lstrip(".") for path in layers}
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": sorted(keys)}
    # mlx-lm counts blocks from the last one; -1 stands for all of them. A block without an
    # adapter gets one whose update is 0.
    return Written(
        tensors,
        {
            "fine_tune_type": "lora" if first.magnitude is None else "dora",
            "num_layers": -1,
            "lora_parameters": parameters | _embeddings(adapters, layers),
        },
        {},
    )


def _embeddings(
    adapters: Mapping[str, AnyLayer], layers: Mapping[str, LowRankLayer]
) -> dict[str, list[str]]:
    """Return the list of the embeddings, if a reader could not know one of them without it."""
    embeddings = [path for path in layers if by_token(adapters, path)]
    unclear = [
        path
        for path, layer in layers.items()
        if layer.shape[0] == layer.shape[1]
        and kind_by_name(path) != ("embedding" if path in embeddings else "linear")
    ]
    return {_ENTRY: sorted(embeddings)} if unclear else {}
