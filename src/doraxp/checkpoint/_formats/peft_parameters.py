"""PEFT's ``target_parameters``: LoRA of tensors that a module has, such as those of its experts.

::

    …experts.base_layer.lora_A.weight    the first of two parameters, in the order of the module
    …experts.lora_A.weight               the last one, or the only one

The file does not name the parameters, so they follow from the configuration, module by module.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from doraxp._base.patterns import matches_any
from doraxp._base.types import Config
from doraxp._base.words import counted
from doraxp._core.kinds import LayerKind
from doraxp.checkpoint._adapters import CONFIG, StoredLayer
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._expert_names import ExpertNames
from doraxp.checkpoint._json import JsonObject
from doraxp.checkpoint._safetensors import Reader

_ORDER = ("gate_up_proj", "gate_up_proj_bias", "up_proj", "down_proj", "down_proj_bias")
"""The parameters of experts, in the order in which the modules of transformers have them."""
_NESTED = re.compile(r"(?P<module>.+?)(?P<nested>(?:\.base_layer)*)")
_ALWAYS_TRANSPOSED = re.compile(r"0\.1[78]\b.*")
"""The versions of PEFT that add (B A)ᵀ to the experts of each model."""

Parts = Mapping[str, Mapping[str, str]]
"""The names of A, B and m by module path and part."""


class Parameters(NamedTuple):
    """The adapters of a file that are of parameters, and the others."""

    modules: dict[str, Mapping[str, str]]
    """The names of A, B and m by module path and part."""
    parameters: dict[str, Mapping[str, str]]
    """Those of parameters, by the name of the parameter."""


def parameters(parts: Parts, config: JsonObject, where: Path) -> Parameters:
    """Return the adapters by module, and by parameter where they are of one.

    Raises
    ------
    CheckpointError
        An entry of ``target_parameters`` is for no adapter, or several are for one.
    """
    targets = _targets(config, where)
    by_module: dict[str, list[str]] = {}
    for path in parts:
        match = _NESTED.fullmatch(path)
        assert match is not None
        by_module.setdefault(match["module"], []).append(path)
    modules: dict[str, Mapping[str, str]] = {}
    of_targets: dict[str, Mapping[str, str]] = {}
    used: set[str] = set()
    for module, paths in by_module.items():
        own = _own_targets(module, targets, len(paths))
        is_short = not any("." in target for found in own.values() for target in found)
        if not own or (is_short and len(paths) == 1 and _is_target_module(module, config, where)):
            modules |= {path: parts[path] for path in paths}
            continue
        used.update(*own.values())
        names = _in_order(module, own, len(paths), where)
        # PEFT wraps the first parameter first, so its name is the longest.
        for name, path in zip(names, sorted(paths, key=len, reverse=True), strict=True):
            of_targets[f"{module}.{name}"] = parts[path]
    unused = [target for target in targets if target not in used]
    if unused:
        raise CheckpointError(
            f"{where}: target_parameters has {', '.join(unused)}, and the file has no adapter for "
            "it: save the adapter again from the trained model, or remove the entry"
        )
    return Parameters(modules, of_targets)


def _targets(config: JsonObject, where: Path) -> list[str]:
    targets = config.get("target_parameters") or []  # null too
    if not isinstance(targets, list) or not all(isinstance(one, str) for one in targets):
        raise CheckpointError(f"{where}: target_parameters must be a list of names, got {targets}")
    return targets


def _own_targets(module: str, targets: Collection[str], count: int) -> dict[str, set[str]]:
    """Return the entries that are for a module, by the parameter that they name.

    An entry without the name of a module may be for any module. So it counts only where the module
    has more adapters than the other entries tell.
    """
    own: dict[str, set[str]] = {}
    for target in targets:
        lead, _, name = target.rpartition(".")
        if not lead or f".{module}".endswith(f".{lead}"):
            own.setdefault(name, set()).add(target)
    named = {name: found for name, found in own.items() if any("." in one for one in found)}
    return named if len(named) == count else own


def _is_target_module(module: str, config: JsonObject, where: Path) -> bool:
    """Return whether ``target_modules`` names a module, as PEFT compares."""
    targets = config.get("target_modules") or ()
    if isinstance(targets, str):
        try:
            return matches_any(f"^(?:{targets})$", [module])
        except ValueError as error:
            raise CheckpointError(f"{where}: target_modules: {error}") from None
    return isinstance(targets, list) and f".{module}".endswith(tuple(f".{one}" for one in targets))


def _in_order(
    module: str, own: Mapping[str, Collection[str]], count: int, where: Path
) -> list[str]:
    """Return the parameters of a module that have adapters, in the order of the module."""
    if len(own) != count:
        raise CheckpointError(
            f"{where}: target_parameters has {', '.join(sorted(own))} for {module}, but the file "
            f"has {counted(count, 'adapter')} of it: save the adapter again from the trained model"
        )
    unknown = [name for name in own if name not in _ORDER]
    if len(own) > 1 and unknown:
        raise CheckpointError(
            f"{where}: the file does not tell which adapter of {module} is for {unknown[0]}: merge "
            "it with PEFT's merge_and_unload instead"
        )
    return sorted(own, key=_ORDER.index) if len(own) > 1 else list(own)


def is_matrix(name: str) -> bool:
    """Return whether a parameter has two axes: a module's weight, or the biases of its experts."""
    return name.rpartition(".")[2] == "weight" or name.endswith("bias")


def stack_layer(
    reader: Reader, name: str, parts: Mapping[str, str], own: Config, config: JsonObject
) -> StoredLayer:
    """Return the layer of a parameter of experts, (experts, …)."""
    a, b = (reader.tensors[parts[part]].shape for part in "ab")
    if len(a) != 2 or len(b) != 2 or 0 in (*a, *b) or b[1] != a[0] or a[0] % own.rank:
        raise CheckpointError(
            f"{reader.path}: {name}: lora_A must have shape (experts * rank, in) and lora_B "
            f"(out, rank * experts) with the rank {own.rank} of {CONFIG}, got {a} and {b}"
        )
    if "m" in parts:
        raise CheckpointError(
            f"{reader.path}: {name} has a magnitude, and PEFT has no DoRA of target_parameters: "
            "train it with doraxp, whose files say how the experts are stored"
        )
    version = config.get("peft_version")
    is_transposed = isinstance(version, str) and _ALWAYS_TRANSPOSED.fullmatch(version) is not None
    experts = a[0] // own.rank
    names = ExpertNames(
        parts["a"], parts["b"], experts, None, True, not is_transposed, isinstance(version, str)
    )
    if is_transposed:
        return StoredLayer(own, LayerKind("transposed_experts"), (experts, a[1], b[0]), names)
    return StoredLayer(own, LayerKind("experts"), (experts, b[0], a[1]), names)
