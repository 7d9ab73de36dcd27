"""The formats of mlx-lm and of LyCORIS and kohya."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from doraxp._base.scalars import check_number
from doraxp._base.types import Adapter, Config
from doraxp._core.kinds import LayerKind
from doraxp.checkpoint._adapters import AdapterSet, StoredLayer
from doraxp.checkpoint._safetensors import DTYPES, CheckpointError, Reader

_LYCORIS = {"lora_down.weight": "a", "lora_up.weight": "b", "dora_scale": "m", "alpha": "alpha"}


def read_mlx(reader: Reader, config: Mapping[str, Any]) -> AdapterSet:
    """Describe the adapters of an mlx-lm folder: A is stored (in, rank), B (rank, out), m (out,).

    Its ``scale`` is s itself, and no alpha.
    """
    where = reader.path.parent / "adapter_config.json"
    if config.get("fine_tune_type") != "dora":
        raise CheckpointError(
            f"{where}: fine_tune_type must be 'dora', got {config.get('fine_tune_type')!r}"
        )
    parameters = config.get("lora_parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    scale = parameters.get("scale")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise CheckpointError(f"{where}: lora_parameters must have a scale above 0, got {scale!r}")
    parts = _parts(reader, {"lora_a": "a", "lora_b": "b", "m": "m"})
    layers = {}
    for path, names in parts.items():
        _check_parts(reader, path, names, "abm")
        a, b, m = (reader.tensors[names[part]].shape for part in "abm")
        if (len(a), len(b), len(m)) != (2, 2, 1) or a[1] != b[0]:
            raise CheckpointError(
                f"{reader.path}: {path}: lora_a {a} and lora_b {b} are no factors"
            )
        if m == (a[0],) and m != (b[1],):
            raise CheckpointError(
                f"{reader.path}: {path} is an embedding with a magnitude for each token: no other "
                "format has one, and it cannot be merged as the others are"
            )
        rank = a[1]
        if parameters.get("rank", rank) != rank:
            raise CheckpointError(
                f"{where}: {path}: the rank is {parameters['rank']!r}, but lora_a has {a}"
            )
        own = _config(reader, path, rank, rank * scale)
        layers[path] = StoredLayer(
            own, LayerKind(), (b[1], a[0]), Adapter(names["a"], names["b"], names["m"]), True
        )
    return AdapterSet("mlx", reader, layers)


def read_lycoris(reader: Reader) -> AdapterSet:
    """Describe the adapters of a LyCORIS or kohya file, linear and convolutions.

    A ``dora_scale`` of shape (1, in) is an old one: the norm is then over the other axis, that is,
    of the columns of W.
    """
    layers = {}
    for path, names in _parts(reader, _LYCORIS).items():
        _check_parts(reader, path, names, "abm")
        down, up, scale = (reader.tensors[names[part]].shape for part in "abm")
        if len(down) < 2 or len(up) != len(down) or up[1] != down[0] or 0 in (*down, *up):
            raise CheckpointError(f"{reader.path}: {path}: {down} and {up} are no factors")
        rank = down[0]
        own = _config(reader, path, rank, _alpha(reader, names))
        if scale[:1] == (up[0],) and math.prod(scale) == up[0]:
            shape = (up[0], *down[1:])
            kind = LayerKind("conv" if len(down) > 2 else "linear")
            layers[path] = StoredLayer(
                own, kind, shape, Adapter(names["a"], names["b"], names["m"])
            )
        elif scale == (1, down[1]):
            # Of Wᵀ, then: its A is Bᵀ and its B is Aᵀ.
            layers[path] = StoredLayer(
                own,
                LayerKind("columns"),
                (up[0], down[1]),
                Adapter(names["b"], names["a"], names["m"]),
                True,
            )
        elif scale[:2] == (1, down[1]) and math.prod(scale) == down[1]:
            raise CheckpointError(
                f"{reader.path}: {path}: a dora_scale of shape {scale} is one for each input "
                "channel of a convolution, as old versions of LyCORIS had it: not supported"
            )
        else:
            raise CheckpointError(
                f"{reader.path}: {path}: a dora_scale of shape {scale} is not one per output row"
            )
    return AdapterSet("lycoris", reader, layers)


def _parts(reader: Reader, ends: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return the names of each module's tensors; any other tensor is an error."""
    parts: dict[str, dict[str, str]] = {}
    for name in reader.tensors:
        end = next((end for end in ends if name.endswith(f".{end}")), None)
        if end is None:
            raise CheckpointError(f"{reader.path}: {name} is no part of a DoRA adapter")
        parts.setdefault(name.removesuffix(f".{end}"), {})[ends[end]] = name
    return parts


def _check_parts(reader: Reader, path: str, names: Mapping[str, str], wanted: str) -> None:
    missing = [part for part in wanted if part not in names]
    if missing == ["m"]:
        raise CheckpointError(f"{reader.path}: {path} has no magnitude: LoRA, and not DoRA")
    if missing:
        raise CheckpointError(f"{reader.path}: {path} must have both factors and a magnitude")


def _alpha(reader: Reader, names: Mapping[str, str]) -> float | None:
    if "alpha" not in names:
        return None
    tensor = reader.tensors[names["alpha"]]
    if math.prod(tensor.shape) != 1 or tensor.dtype not in DTYPES:
        raise CheckpointError(f"{reader.path}: {names['alpha']} must be one floating number")
    alpha = float(reader.read(names["alpha"]).reshape(()))
    try:
        return check_number("alpha", alpha, positive=True)
    except ValueError as error:
        raise CheckpointError(f"{reader.path}: {names['alpha']}: {error}") from None


def _config(reader: Reader, path: str, rank: int, alpha: float | None) -> Config:
    try:
        return Config(rank, alpha)
    except ValueError as error:
        raise CheckpointError(f"{reader.path}: {path}: {error}") from None
