"""diffusers' files: PEFT's names after the part of the pipeline, the configuration in the header.

::

    unet.mid_block.attentions.0.proj_in.lora_A.weight      of a pipeline
    mid_block.attentions.0.proj_in.lora_A.weight           of one model

The entry ``lora_adapter_metadata`` of the header is PEFT's configuration as JSON; of a pipeline the
part stands before the name of each of its entries. Without it s is 1, as diffusers takes it then.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping

from doraxp.checkpoint._adapters import AdapterSet, Added, StoredLayer
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._formats import peft
from doraxp.checkpoint._formats.peft_writing import PREFIX, base_entries, whole_path
from doraxp.checkpoint._formats.protocol import Written
from doraxp.checkpoint._formats.whole import check_no_whole_tensors
from doraxp.checkpoint._json import JsonObject, parse_json
from doraxp.checkpoint._safetensors import Reader
from doraxp.checkpoint._updated_layer import AnyLayer

NAME, FILE = "diffusers", "pytorch_lora_weights.safetensors"
_ENTRY = "lora_adapter_metadata"
PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
"""The parts of a pipeline that may have an adapter, as its folders are named."""


def recognises(reader: Reader, parts: Collection[str]) -> bool:
    """Return True for PEFT's names in a file of diffusers' name, or with its entry."""
    is_own = _ENTRY in reader.metadata or reader.path.name == FILE
    return is_own and peft.recognises(reader, parts)


def read(reader: Reader) -> AdapterSet:
    """Describe the adapters of a file of diffusers."""
    parts, rest = peft.sort_names(reader, None)
    if rest:
        raise CheckpointError(f"{reader.path}: {rest[0]} is not part of an adapter")
    groups: dict[str, dict[str, dict[str, str]]] = defaultdict(dict)
    for path, names in parts.items():
        part, dot, own = path.partition(".")
        groups[f"{part}{dot}" if part in PARTS else ""][own if part in PARTS else path] = names
    layers: dict[str, StoredLayer] = {}
    differences: dict[str, Added] = {}
    changes, biases = set(), set()
    for prefix, members in groups.items():
        config = _config(reader, prefix, members)
        found = peft.adapted_layers(reader, members, config, reader.path)
        layers |= {f"{prefix}{path}": layer for path, layer in found.items()}
        biases_of_b = peft.bias_changes(members, found)
        differences |= {f"{prefix}{name}": added for name, added in biases_of_b.items()}
        changes.add(peft.base_change(config, reader.path))
        biases.add(peft.trained_biases(config, reader.path))
    changed, trained = (sorted(filter(None, values)) for values in (changes, biases))
    return AdapterSet(
        NAME,
        reader,
        layers,
        base_change=changed[0] if changed else None,
        trained_biases=trained[0] if trained else None,
        differences=differences,
        is_of_images=True,
    )


def _config(reader: Reader, prefix: str, parts: Mapping[str, Mapping[str, str]]) -> JsonObject:
    """Return PEFT's configuration of one part of the pipeline."""
    if _ENTRY not in reader.metadata:
        ranks = {
            whole_path(path): reader.tensors[names["a"]].shape[0]
            for path, names in parts.items()
            if "a" in names
        }
        return {
            "peft_type": "LORA",
            "use_dora": any("m" in names for names in parts.values()),
            "init_lora_weights": True,
            "rank_pattern": ranks,
            "alpha_pattern": ranks,
        }
    entries = parse_json(reader.metadata[_ENTRY].encode(), reader.path)
    own = {
        name.removeprefix(prefix): value
        for name, value in entries.items()
        if name.startswith(prefix)
    }
    return {"peft_type": "LORA"} | (own or entries)


def write(adapters: Mapping[str, AnyLayer]) -> Written:
    """Return the tensors and the header that diffusers reads as these adapters."""
    check_no_whole_tensors(adapters, "diffusers")
    written = peft.write(adapters)
    if (written.config or {}).get("target_parameters"):
        raise ValueError("diffusers has no adapter of experts: save them as PEFT's format")
    tensors = {name.removeprefix(PREFIX): array for name, array in written.tensors.items()}
    used = {path.partition(".")[0] for path in adapters}
    if used.isdisjoint(PARTS):
        entries = written.config
    elif used <= set(PARTS):
        changes = base_entries(adapters) if isinstance(adapters, AdapterSet) else {}
        entries = {
            f"{part}.{name}": value
            for part in sorted(used)
            for name, value in (_part(part, adapters) | changes).items()
        }
    else:
        odd = next(path for path in adapters if path.partition(".")[0] not in PARTS)
        raise ValueError(f"{odd}: each path must begin with a part of the pipeline, or no path may")
    return Written(tensors, None, {_ENTRY: json.dumps(entries, indent=2, sort_keys=True)})


def _part(part: str, adapters: Mapping[str, AnyLayer]) -> JsonObject:
    """Return PEFT's configuration of one part of a pipeline."""
    members = {
        path.removeprefix(f"{part}."): layer
        for path, layer in adapters.items()
        if path.startswith(f"{part}.")
    }
    return peft.write(members).config or {}
