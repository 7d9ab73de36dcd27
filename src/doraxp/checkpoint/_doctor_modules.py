"""The modules of a base: how each stores its weight, and which of them get an adapter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import NamedTuple, TypeAlias, cast

from doraxp._base.types import Array
from doraxp._core.kinds import LayerKind
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._experts import TRANSPOSED
from doraxp.checkpoint._json import JsonObject
from doraxp.checkpoint._model import Model
from doraxp.checkpoint._orientation import is_transposed, may_transpose
from doraxp.checkpoint._quantised.protocol import Refused
from doraxp.checkpoint._safetensors import DTYPES, Source
from doraxp.layers import Targets, find_targets

Modules: TypeAlias = str | Iterable[str]


_FUSED = frozenset(
    (
        *("c_attn", "qkv_proj", "qkv", "query_key_value", "Wqkv", "wqkv", "W_pack", "in_proj"),
        *("gate_up_proj", "gate_up", "attn_qkv", "to_qkv", "add_qkv_proj", "mixed_qkv"),
    )
)
"""Modules whose rows are those of several projections."""
_OF_ADAPTER = re.compile(r"[._]lora_(a|b|up|down|magnitude_vector)\b", re.IGNORECASE)


class Refusal(NamedTuple):
    """Why no number of a weight can be read."""

    problem: str
    """The rest of a sentence that begins with the weight."""
    is_quantised: bool


class Layout(NamedTuple):
    """The tensors of a base: the weights of modules, and all others."""

    names: dict[str, str]
    """The weight of each module, by path. Modules of which no number can be read are not in it."""
    kinds: dict[str, LayerKind]
    """How each module stores its weight, by path."""
    sources: dict[str, Source]
    """All tensors that can be read as numbers, by name."""
    refused: dict[str, Refusal]
    """The modules of which no number can be read, by path."""
    reasons: dict[str, str]
    """By path, why "all-linear" leaves out a module."""
    targets: Targets


def layout_of(model: Model, target_modules: Modules, exclude_modules: Modules | None) -> Layout:
    """Return the modules of a base, and those that the patterns select.

    Raises
    ------
    CheckpointError
        The tensors are those of an adapter.
    ValueError
        A string is not a regular expression.
    """
    of_adapter = next((name for name in model.stored if _OF_ADAPTER.search(name)), None)
    if of_adapter is not None:
        raise CheckpointError(
            f"{model.path}: must be a model, but {of_adapter} is a tensor of an adapter: give the "
            "base, or see the adapter with doraxp inspect"
        )
    refused = {name: one for name, one in model.quantised.items() if isinstance(one, Refused)}
    parts = {part for one in refused.values() for part in one.tensors}
    every = {name: one for name, one in model.sources().items() if name not in parts}
    sources = {name: one for name, one in every.items() if one.tensor.dtype in DTYPES}
    shapes = {name: one.tensor.shape for name, one in every.items()}
    modules = [name for name, shape in shapes.items() if _is_module(name, shape)]
    problems = {name: Refusal(one.problem, is_quantised=True) for name, one in refused.items()}
    problems |= {
        name: Refusal(f"has dtype {every[name].tensor.dtype}, not a float", is_quantised=False)
        for name in modules
        if name not in sources
    }
    # The shape of a refused weight is not known. With two axes a target may select it.
    shown = {name: shapes.get(name, (1, 1)) for name in (*modules, *refused)}
    weights = {name: cast(Array, SimpleNamespace(shape=shape)) for name, shape in shown.items()}
    flipped = _flipped(model, shapes, modules)
    kinds = {_path(name): LayerKind("transposed") for name in flipped}
    reasons = find_targets(weights, "all-linear", kinds=kinds).left_out
    found = find_targets(weights, target_modules, exclude_modules=exclude_modules, kinds=kinds)
    readable = [name for name in modules if name in sources]
    return Layout(
        {_path(name): name for name in readable},
        {
            path: kinds.get(path) or _kind(path, shapes[name], model.config, reasons)
            for name in readable
            for path in (_path(name),)
        },
        sources,
        {_path(name): problem for name, problem in problems.items()},
        reasons,
        found,
    )


def is_fused(path: str) -> bool:
    """Return whether a module is several projections in one, by its name."""
    return path.rpartition(".")[2] in _FUSED


def _path(name: str) -> str:
    return name.removesuffix(".weight")


def _is_module(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor is a weight that may be adapted: of a module, or of all experts."""
    if 0 in shape:
        return False
    if name.endswith(".weight"):
        return 2 <= len(shape) <= 5
    return len(shape) == 3 and "experts" in name and not name.endswith("bias")


def _flipped(model: Model, shapes: Mapping[str, tuple[int, ...]], names: list[str]) -> set[str]:
    """Return the weights that are stored (in, out)."""
    kind = model.config.get("model_type")
    if not may_transpose(shapes, kind):
        return set()
    matrices = [name for name in names if len(shapes[name]) == 2]
    return {name for name in matrices if is_transposed(name, shapes, kind, {}, flag=False)}


def _kind(
    path: str, shape: tuple[int, ...], config: JsonObject, reasons: Mapping[str, str]
) -> LayerKind:
    if len(shape) == 2:
        return LayerKind("embedding" if reasons.get(path) == "embedding" else "linear")
    if len(shape) == 3 and "experts" in path:
        is_flipped = _is_flipped(path, shape, config)
        return LayerKind("transposed_experts" if is_flipped else "experts")
    return LayerKind("conv")


def _is_flipped(path: str, shape: tuple[int, ...], config: JsonObject) -> bool:
    """Return whether experts are stored (experts, in, out): by hidden_size, or by the family.

    hidden_size is the output of "down" and the input of the others.
    """
    text = config.get("text_config")
    parts = [one for one in (config, text) if isinstance(one, dict)]
    sizes = {one.get("hidden_size") for one in parts}
    first, second = (size in sizes for size in shape[1:])
    if first != second:
        return second if "down" in path else first
    return not {one.get("model_type") for one in parts}.isdisjoint(TRANSPOSED)
