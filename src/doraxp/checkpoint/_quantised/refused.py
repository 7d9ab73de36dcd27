"""Quantised weights that no adapter can be merged into, by the names and dtypes of their tensors.

The registry gives this module the tensors that are not part of a weight in a known format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from doraxp._base.safetensors import Tensor
from doraxp.checkpoint._quantised.protocol import Fetch, Found, Refused, Settings
from doraxp.checkpoint._safetensors import DTYPES

ADVICE = (
    "cannot be merged into: merge into the 16-bit model from which it was quantised, and quantise "
    "the merged model"
)
_FP8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4")
_WHOLE = ("I8", "U8", "I16", "U16", "I32", "U32", "F4")


class _Layout(NamedTuple):
    """How a format is recognised: a tensor of the codes, and another one beside it."""

    method: str
    codes: str
    beside: str
    """The suffix of another tensor; empty where the name of the codes suffices."""


_LAYOUTS = (
    _Layout("NVFP4", "weight", "weight_scale_2"),
    _Layout("NVFP4", "weight_packed", "weight_global_scale"),
    _Layout("compressed-tensors, 4-bit floats", "weight_packed", "weight_scale"),
    _Layout("GPTQ", "qweight", "g_idx"),
    _Layout("AWQ or GPTQ", "qweight", ""),
    _Layout("AQLM", "codes", "codebooks"),
    _Layout("VPTQ", "indices", "centroids"),
    _Layout("HQQ", "W_q", ""),
    _Layout("EETQ", "weight", "weight_scales"),
    _Layout("quanto", "weight._data", ""),
    _Layout("torchao", "_weight_qdata", ""),
)
_BESIDE = (
    "weight", "weight_packed", "weight_scale", "weight_scale_2", "weight_scales", "weight_shape",
    "weight_global_scale", "weight_zero_point", "weight_g_idx", "weight_scale_inv",
    "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map",
    "weight._data", "weight._scale", "weight._shift", "_weight_qdata", "_weight_scale",
    "_weight_zero_point", "qweight", "qzeros", "scales", "biases", "g_idx", "codes", "codebooks",
    "indices", "centroids", "W_q", "meta", "scale", "zero", "input_scale", "SCB", "weight_format",
)  # fmt: skip
_SCALES = (".weight_scale", ".weight_scale_inv", ".scales")
"""Tensors that a dense weight does not have beside it."""
_METHODS = {"bitsandbytes": "", "fp8": "", "compressed-tensors": "", "mxfp4": ""}
"""The methods with a format here: a weight that is refused lacks a tensor."""


def find(tensors: Mapping[str, Tensor], settings: Settings, fetch: Fetch) -> Iterator[Found]:
    """Yield the weights that are quantised in another format, or lack a tensor."""
    method = settings.entries.get("quant_method")
    seen = set()
    for name in tensors:
        module, problem = _problem(name, tensors, method)
        if problem and module not in seen:
            seen.add(module)
            yield module, Refused(_tensors(module, name, tensors), problem)


def _tensors(weight: str, codes: str, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the names of the tensors of a weight, with those of the codes first."""
    module = weight.removesuffix(".weight")
    beside = (f"{module}.{suffix}" for suffix in _BESIDE)
    more = [f"{weight}_blocks", f"{weight}_scales", f"{weight}_scale_inv"]
    return (codes, *(name for name in (*beside, *more) if name in tensors and name != codes))


def _problem(name: str, tensors: Mapping[str, Tensor], method: object) -> tuple[str, str]:
    """Return the name of the weight that a tensor belongs to, and its problem; "" without one."""
    for layout in _LAYOUTS:
        module = name.removesuffix(f".{layout.codes}")
        if module == name or (layout.beside and f"{module}.{layout.beside}" not in tensors):
            continue
        if tensors[name].dtype in _WHOLE + _FP8:
            return f"{module}.weight", f"is quantised ({layout.method}) and {ADVICE}"
    for suffix, missing in (
        (".weight.absmax", ".weight.quant_state.bitsandbytes__nf4"),
        (".weight_packed", ".weight_scale"),
    ):
        module = name.removesuffix(suffix)
        if module != name:
            return f"{module}.weight", f"is quantised, but {module}{missing} is missing"
    for suffix in _SCALES:
        weight = f"{name.removesuffix(suffix)}.weight"
        if name.endswith(suffix) and weight in tensors and tensors[weight].dtype in DTYPES:
            return weight, f"is quantised (dtype {tensors[weight].dtype}, with {name}) and {ADVICE}"
    weight = name.removesuffix("_blocks")
    if weight != name and tensors[name].dtype == "U8" and len(tensors[name].shape) == 4:
        return weight, f"is quantised (MXFP4), but {weight}_scales is missing"
    dtype, axes = tensors[name].dtype, len(tensors[name].shape)
    is_weight = name.endswith(".weight") and dtype in _WHOLE
    if axes < 2 or not (is_weight or (dtype in _FP8 and "scale" not in name.split(".")[-1])):
        return name, ""
    if isinstance(method, str) and method not in _METHODS:
        return name, f"is quantised ({method}) and {ADVICE}"
    missing = " or ".join(_missing(name, dtype, method))
    return name, f"is quantised ({dtype}), but its scales are missing: {missing}"


def _missing(name: str, dtype: str, method: object) -> list[str]:
    """Return the names of tensors of which the first one that the method has is missing."""
    module = name.removesuffix(".weight")
    if dtype in _FP8:
        names = {"fp8": f"{name}_scale_inv", "compressed-tensors": f"{module}.weight_scale"}
    elif dtype == "U32":
        names = {"mlx": f"{module}.scales"}
    elif dtype == "U8":
        names = {"bitsandbytes": f"{name}.quant_state.bitsandbytes__nf4"}
    else:
        names = {
            "bitsandbytes": f"{module}.SCB",
            "compressed-tensors": f"{module}.weight_scale",
        }
    return [names[method]] if isinstance(method, str) and method in names else [*names.values()]
