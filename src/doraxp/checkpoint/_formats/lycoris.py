"""LyCORIS' and kohya's files, linear layers and convolutions; read only.

The names have an underscore for each dot of the base's names. A ``dora_scale`` of shape (1, in) is
of an old LyCORIS, which normed the columns of W.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from doraxp._base.scalars import check_number
from doraxp._core.kinds import LayerKind
from doraxp.checkpoint._adapters import AdapterSet, StoredLayer, TensorNames
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._formats.checks import checked_config, complete_names, names_by_module
from doraxp.checkpoint._safetensors import DTYPES, Reader

_ENDS = {"lora_down.weight": "a", "lora_up.weight": "b", "dora_scale": "m", "alpha": "alpha"}


def recognises(parts: Collection[str]) -> bool:
    """Return True for names with kohya's factors or LyCORIS' magnitude."""
    return not {"lora_down", "dora_scale"}.isdisjoint(parts)


def read(reader: Reader) -> AdapterSet:
    """Describe the adapters of a LyCORIS or kohya file."""
    layers = {
        path: _layer(reader, path, parts) for path, parts in names_by_module(reader, _ENDS).items()
    }
    return AdapterSet("lycoris", reader, layers, dots_lost=True, is_of_images=True)


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
    if math.prod(tensor.shape) != 1 or tensor.dtype not in DTYPES:
        raise CheckpointError(f"{reader.path}: {name} must be one floating number")
    try:
        return check_number("alpha", float(reader.read(name).reshape(())), positive=True)
    except ValueError as error:
        raise CheckpointError(f"{reader.path}: {name}: {error}") from None
