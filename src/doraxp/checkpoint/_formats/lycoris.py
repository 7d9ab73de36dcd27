"""The single files of image trainers: kohya, LyCORIS and those that follow them; read only.

::

    A  lora_down.weight or lora_A.weight    m  dora_scale or lora_magnitude_vector
    B  lora_up.weight or lora_B.weight      s  alpha / rank, or 1 without alpha
    core  lora_mid.weight                   LoHa and LoKr: see `products`
    diff, diff_b                            differences of a whole weight and of its bias

The names have an underscore for each dot of the base's names, or dots. A ``dora_scale`` of shape
(1, in, …) has a norm for each input, as LyCORIS has it with ``wd_on_output=False``; without one,
the module is plain LoRA, LoHa or LoKr. ``w_norm`` and ``b_norm`` are what LyCORIS adds to the
weight and the bias of a norm.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping

import numpy as np

from doraxp._base.scalars import check_number
from doraxp._base.types import Config
from doraxp._core.kinds import LayerKind
from doraxp.checkpoint._adapters import AdapterSet, Added, StoredLayer, config_path
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._formats.checks import checked_config, names_by_module
from doraxp.checkpoint._formats.products import LOHA, LOKR, product
from doraxp.checkpoint._safetensors import DTYPES, Reader
from doraxp.checkpoint._update_names import DifferenceNames, TensorNames, UpdateNames

_ENDS = {
    **dict.fromkeys(("lora_down.weight", "lora_A.weight"), "a"),
    **dict.fromkeys(("lora_up.weight", "lora_B.weight"), "b"),
    **dict.fromkeys(("dora_scale", "lora_magnitude_vector.weight", "lora_magnitude_vector"), "m"),
    "lora_mid.weight": "core",
    "alpha": "alpha",
    "w_norm": "weight",
    "b_norm": "bias",
    "diff": "diff",
    "diff_b": "diff_b",
    **{name: name for name in (*LOHA, *LOKR)},
}
_ALGORITHMS = {
    "LoRA": {"a", "b", "core"},
    "LoHa": set(LOHA),
    "LoKr": set(LOKR),
    "full": {"diff"},
    "norm": {"weight", "bias"},
}
"""The parts of a module by the algorithm that they are of."""
_OWN = {"lora_down", "dora_scale", "diff", "hada_w1_a", "lokr_w1", "lokr_w1_a", "w_norm"}

_OF_IMAGES = re.compile(
    r"(?:model\.)?(?:diffusion_model|(?:lora_)?unet|transformer|text_encoder(?:_\d)?|lora_te\d?)\."
)
_INTEGERS = {f"I{bits}": np.dtype(f"<i{bits // 8}") for bits in (8, 16, 32, 64)}


def recognises(reader: Reader, parts: Collection[str]) -> bool:
    """Return True for names with kohya's factors, or with the parts that LyCORIS names.

    Some trainers write lora_A and lora_B under the part of an image model, without a configuration.
    """
    if not _OWN.isdisjoint(parts):
        return not any(name.startswith("base_model.") for name in reader.tensors)
    is_alone = "lora_A" in parts and not config_path(reader).is_file()
    return is_alone and all(map(_OF_IMAGES.match, reader.tensors))


def read(reader: Reader) -> AdapterSet:
    """Describe the adapters of a LyCORIS or kohya file."""
    layers: dict[str, StoredLayer] = {}
    differences: dict[str, Added] = {}
    for path, parts in names_by_module(reader, _ENDS).items():
        algorithm = _algorithm(reader, path, parts)
        if algorithm == "norm":
            differences |= {f"{path}.{leaf}": Added(name) for leaf, name in parts.items()}
            continue
        if "diff_b" in parts:
            differences[f"{path}.bias"] = Added(parts["diff_b"])
        if algorithm == "full" and len(reader.tensors[parts["diff"]].shape) < 2:
            differences[f"{path}.weight"] = Added(parts["diff"])
        elif algorithm is not None:
            layers[path] = _layer(reader, path, parts, algorithm)
    return AdapterSet("lycoris", reader, layers, is_of_images=True, differences=differences)


def _algorithm(reader: Reader, path: str, parts: Mapping[str, str]) -> str | None:
    """Return the one algorithm of a module; None for a difference of the bias alone."""
    found = [name for name, own in _ALGORITHMS.items() if not own.isdisjoint(parts)]
    if len(found) > 1:
        raise CheckpointError(
            f"{reader.path}: {path} has {' and '.join(_first_of(parts, one) for one in found)}: "
            "remove the tensors that are out of date"
        )
    beside = parts.keys() - {"diff_b"} - _ALGORITHMS.get("".join(found), set())
    allowed = set() if found in ([], ["norm"]) else {"m", "alpha"}
    if beside - allowed:
        odd = parts[sorted(beside - allowed)[0]]
        raise CheckpointError(f"{reader.path}: {path} has {odd}, but no update that it is for")
    return found[0] if found else None


def _first_of(parts: Mapping[str, str], algorithm: str) -> str:
    """Return the name of a tensor of one algorithm, with the algorithm."""
    name = next(name for part, name in parts.items() if part in _ALGORITHMS[algorithm])
    return f"{name} of {algorithm}"


def _layer(reader: Reader, path: str, parts: Mapping[str, str], algorithm: str) -> StoredLayer:
    """Return the layer of a module: its update by the algorithm, its kind by the magnitude."""
    names, shape, rank = _update(reader, path, parts, algorithm)
    config = Config(1)  # both sides of LoKr whole, or a difference: s = 1
    if rank is not None:
        config = checked_config(reader, path, rank, _alpha(reader, parts))
    if names.magnitude is None:
        return StoredLayer(config, LayerKind("conv" if len(shape) > 2 else "linear"), shape, names)
    scale = reader.tensors[names.magnitude].shape
    out, columns = shape[0], math.prod(shape[1:])
    if scale[:1] == (out,) and math.prod(scale) == out:
        return StoredLayer(config, LayerKind("conv" if len(shape) > 2 else "linear"), shape, names)
    inner = shape[1] if len(shape) > 2 or len(scale) < 3 else scale[1]
    if scale[:2] == (1, inner) and math.prod(scale) == inner and columns % inner == 0:
        if len(scale) > 2 and len(shape) == 2:
            shape = out, inner, columns // inner  # the base tells the kernel
        return StoredLayer(config, LayerKind("columns"), shape, names)
    raise CheckpointError(
        f"{reader.path}: {path}: dora_scale must have one number for each output row or for each "
        f"input of a weight of shape {shape}, got shape {scale}"
    )


def _update(
    reader: Reader, path: str, parts: Mapping[str, str], algorithm: str
) -> tuple[UpdateNames, tuple[int, ...], int | None]:
    """Return the names of an update, the shape of its weight, and its rank."""
    m = parts.get("m")
    if algorithm == "full":
        return DifferenceNames(parts["diff"], m), reader.tensors[parts["diff"]].shape, None
    if algorithm != "LoRA":
        return product(reader, path, parts, m)
    if not {"a", "b"} <= parts.keys():
        raise CheckpointError(f"{reader.path}: {path} must have lora_up and lora_down")
    names = TensorNames(parts["a"], parts["b"], m, parts.get("core"))
    down, up = (reader.tensors[name].shape for name in names[:2])
    if len(down) < 2 or len(up) != len(down) or up[1] != down[0] or 0 in (*down, *up):
        raise CheckpointError(
            f"{reader.path}: {path}: lora_down must have shape (rank, in, ...) and lora_up "
            f"(out, rank, ...), got {down} and {up}"
        )
    if names.core is None:
        return names, (up[0], *down[1:]), down[0]
    core = reader.tensors[names.core].shape
    if len(core) < 3 or core[:2] != (down[0], down[0]) or math.prod((*down[2:], *up[2:])) != 1:
        raise CheckpointError(
            f"{reader.path}: {path}: lora_mid must have shape (rank, rank, *kernel) between a "
            f"lora_down and a lora_up without a kernel, got {core}, {down} and {up}"
        )
    return names, (up[0], down[1], *core[2:]), down[0]


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
