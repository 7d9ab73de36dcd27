"""The single files of image trainers: kohya, LyCORIS and those that follow them; read only.

::

    A  lora_down.weight or lora_A.weight    m  dora_scale or lora_magnitude_vector
    B  lora_up.weight or lora_B.weight      s  alpha / rank, or 1 without alpha

The names have an underscore for each dot of the base's names, or dots. A ``dora_scale`` of shape
(1, in) is of an old LyCORIS, which normed the columns of W. ``w_norm`` and ``b_norm`` are what
LyCORIS adds to the weight and the bias of a norm.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np

from doraxp._base.scalars import check_number
from doraxp._core.kinds import LayerKind
from doraxp.checkpoint._adapters import AdapterSet, StoredLayer, TensorNames
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._formats.checks import checked_config, complete_names, names_by_module
from doraxp.checkpoint._safetensors import DTYPES, Reader

_ENDS = {
    **dict.fromkeys(("lora_down.weight", "lora_A.weight"), "a"),
    **dict.fromkeys(("lora_up.weight", "lora_B.weight"), "b"),
    **dict.fromkeys(("dora_scale", "lora_magnitude_vector.weight", "lora_magnitude_vector"), "m"),
    "alpha": "alpha",
    "w_norm": "weight",
    "b_norm": "bias",
}

_INTEGERS = {f"I{bits}": np.dtype(f"<i{bits // 8}") for bits in (8, 16, 32, 64)}


def recognises(reader: Reader, parts: Collection[str]) -> bool:
    """Return True for names with kohya's factors or LyCORIS' magnitude."""
    return not {"lora_down", "dora_scale"}.isdisjoint(parts)


def read(reader: Reader) -> AdapterSet:
    """Describe the adapters of a LyCORIS or kohya file."""
    modules = names_by_module(reader, _ENDS)
    norms = {path: parts for path, parts in modules.items() if parts.keys() <= {"weight", "bias"}}
    both = next(
        (
            path
            for path in modules
            if path not in norms and {"weight", "bias"} & modules[path].keys()
        ),
        None,
    )
    if both is not None:
        raise CheckpointError(f"{reader.path}: {both} has an adapter, and w_norm or b_norm too")
    layers = {
        path: _layer(reader, path, parts) for path, parts in modules.items() if path not in norms
    }
    return AdapterSet(
        "lycoris",
        reader,
        layers,
        is_of_images=True,
        differences={
            f"{path}.{leaf}": name for path, parts in norms.items() for leaf, name in parts.items()
        },
    )


def _layer(reader: Reader, path: str, parts: Mapping[str, str]) -> StoredLayer:
    names = complete_names(reader, path, parts)
    down, up, scale = (reader.tensors[name].shape for name in names)
    if len(down) < 2 or len(up) != len(down) or up[1] != down[0] or 0 in (*down, *up):
        raise CheckpointError(
            f"{reader.path}: {path}: lora_down must have shape (rank, in, ...) and lora_up "
            f"(out, rank, ...), got {down} and {up}"
        )
    config = checked_config(reader, path, down[0], _alpha(reader, parts))
    if scale[:1] == (up[0],) and math.prod(scale) == up[0]:
        kind = LayerKind("conv" if len(down) > 2 else "linear")
        return StoredLayer(config, kind, (up[0], *down[1:]), names)
    if scale == (1, down[1]):
        # The adapter is that of Wᵀ: its A is Bᵀ and its B is Aᵀ.
        swapped = TensorNames(names.lora_b, names.lora_a, names.magnitude)
        return StoredLayer(config, LayerKind("columns"), (up[0], down[1]), swapped, True)
    if scale[:2] == (1, down[1]) and math.prod(scale) == down[1]:
        raise CheckpointError(
            f"{reader.path}: {path}: a dora_scale of shape {scale} has one number for each input "
            "channel of a convolution, as old versions of LyCORIS wrote it: not supported"
        )
    raise CheckpointError(
        f"{reader.path}: {path}: dora_scale must have one number for each output row, got shape "
        f"{scale}"
    )


def _alpha(reader: Reader, parts: Mapping[str, str]) -> float | None:
    if "alpha" not in parts:
        return None
    name = parts["alpha"]
    tensor = reader.tensors[name]
    is_number = tensor.dtype in DTYPES or tensor.dtype in _INTEGERS
    if math.prod(tensor.shape) != 1 or not is_number:
        raise CheckpointError(f"{reader.path}: {name} must be one number")
    try:
        return check_number("alpha", _number(reader, name), positive=True)
    except ValueError as error:
        raise CheckpointError(f"{reader.path}: {name}: {error}") from None


def _number(reader: Reader, name: str) -> float:
    dtype = reader.tensors[name].dtype
    if dtype in DTYPES:
        return float(reader.read(name).reshape(()))
    (raw,) = map(bytes, reader.chunks(name))
    return float(np.frombuffer(raw, _INTEGERS[dtype])[0])
