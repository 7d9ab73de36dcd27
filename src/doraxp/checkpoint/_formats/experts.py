"""DoRA of fused experts in a folder like PEFT's, a layout of doraxp (docs/howto/experts.md).

::

    P.lora_A.weight            (experts, rank, in)      P  the name of the parameter
    P.lora_B.weight            (experts, out, rank)
    P.lora_magnitude_vector    (experts, out)

The entry "doraxp" of the header has the version of the layout and the kind of each parameter. The
configuration has ``use_dora`` and ``target_parameters``, which PEFT refuses together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from doraxp._base.types import Config
from doraxp._core.kinds import KindName, LayerKind
from doraxp.checkpoint._adapters import CONFIG, StoredLayer
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._expert_names import ExpertNames
from doraxp.checkpoint._json import parse_json
from doraxp.checkpoint._safetensors import Reader

KEY, NAME = "doraxp", "experts"
"""The entry of the header, and the name in it."""
VERSION = 1
_KINDS: dict[object, KindName] = {
    "experts": "experts",
    "transposed_experts": "transposed_experts",
}


def entry(kinds: Mapping[str, LayerKind]) -> dict[str, Any]:
    """Return the value in the header for these parameters."""
    return {"version": VERSION, "modules": {path: kind.name for path, kind in kinds.items()}}


def kinds(reader: Reader) -> dict[str, LayerKind]:
    """Return the kinds of the parameters of experts that a file has; none in another layout.

    Raises
    ------
    CheckpointError
        The entry is malformed, or of another version.
    """
    if KEY not in reader.metadata:
        return {}
    found = parse_json(reader.metadata[KEY].encode(), reader.path).get(NAME)
    if found is None:
        return {}
    where = f"{reader.path}: {NAME} of the entry {KEY} of the header"
    version = found.get("version") if isinstance(found, dict) else None
    if version != VERSION or isinstance(version, bool):
        raise CheckpointError(f"{where} must have version {VERSION}, got {found}: update doraxp")
    modules = found.get("modules") if isinstance(found, dict) else None
    if not isinstance(modules, dict) or not all(
        isinstance(kind, str) and kind in _KINDS for kind in modules.values()
    ):
        raise CheckpointError(
            f"{where} must have modules, an object of the kinds {', '.join(map(str, _KINDS))} by "
            f"parameter, got {modules}: save the adapter again"
        )
    return {path: LayerKind(_KINDS[kind]) for path, kind in modules.items()}


def expert_layer(
    reader: Reader, path: str, parts: Mapping[str, str], own: Config, kind: LayerKind
) -> StoredLayer:
    """Return the layer of a parameter whose A, B and m are stacks."""
    if set(parts) != {"a", "b", "m"}:
        raise CheckpointError(
            f"{reader.path}: {path} must have lora_A, lora_B and lora_magnitude_vector"
        )
    a, b, m = (reader.tensors[parts[part]].shape for part in "abm")
    fits = len(a) == len(b) == 3 and 0 not in (*a, *b)
    if not fits or (a[0], a[1]) != (b[0], b[2]) or m != b[:2] or a[1] != own.rank:
        raise CheckpointError(
            f"{reader.path}: {path}: lora_A must have shape (experts, rank, in), lora_B (experts, "
            f"out, rank) and lora_magnitude_vector (experts, out), with the rank {own.rank} of "
            f"{CONFIG}, got {a}, {b} and {m}"
        )
    sides = (b[1], a[2])
    shape = (a[0], *(sides[::-1] if kind.is_transposed else sides))
    return StoredLayer(own, kind, shape, ExpertNames(parts["a"], parts["b"], a[0], parts["m"]))
