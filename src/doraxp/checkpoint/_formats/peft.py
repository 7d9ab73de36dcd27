"""PEFT's folders, and those of NVlabs' PEFT from before DoRA was merged into PEFT.

Both keep A, B and m of each module under the module's own name, whole tensors beside them
(biases, ``modules_to_save``), and the rest in ``adapter_config.json``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from doraxp._base.types import Config
from doraxp._base.words import counted
from doraxp._core.kinds import LayerKind
from doraxp.checkpoint._adapters import (
    CONFIG,
    AdapterSet,
    Added,
    StoredLayer,
    config_path,
)
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._formats.experts import expert_layer, kinds
from doraxp.checkpoint._formats.peft_config import (
    base_change,
    check_complete,
    flag,
    head,
    layer_configs,
    token_rows,
    trained_biases,
)
from doraxp.checkpoint._formats.peft_parameters import is_matrix, parameters, stack_layer
from doraxp.checkpoint._formats.peft_writing import PREFIX, write
from doraxp.checkpoint._formats.products import LOHA, LOKR, product
from doraxp.checkpoint._json import JsonObject, read_json
from doraxp.checkpoint._safetensors import Reader, Source, are_equal
from doraxp.checkpoint._update_names import KroneckerNames, TensorNames

__all__ = [
    "FILE",
    "NAME",
    "adapted_layers",
    "base_change",
    "bias_changes",
    "read",
    "recognises",
    "sort_names",
    "trained_biases",
    "write",
]

NAME, FILE = "peft", "adapter_model.safetensors"
_NAME = re.compile(
    r"(?P<path>.+)\.(?:(?P<a>lora_(?:embedding_)?A)|(?P<bias>lora_B(?=(?:\.[^.]+)?\.bias$))"
    r"|(?P<b>lora_(?:embedding_)?B)|(?P<m>lora_magnitude_vector|weight_m_wdecomp))"
    r"(?:\.(?!(?:weight|bias)$)(?P<name>[^.]+))?(?:\.(?:weight|bias))?"
)
PRODUCTS = ("LOHA", "LOKR")
"""The values of ``peft_type`` of adapters that `products` describes."""
_PRODUCT = re.compile(rf"(?P<path>.+)\.(?P<part>{'|'.join((*LOHA, *LOKR))})(?:\.(?P<name>[^.]+))?")
_PARTS = {*LOHA, *LOKR, "lora_A", "lora_embedding_A", "lora_magnitude_vector", "weight_m_wdecomp"}
_AROUND = re.compile(r"((module|_orig_mod)\.)*(base_model\.model\.)+")
_TORCHTUNE = {"r", "lora_alpha", "target_modules", "peft_type", "base_model_name_or_path"}
"""The entries of torchtune's export, which has no others."""
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?")
_BEFORE = re.compile(r"\.original_module(?=\.)")
# Each of these entries changes the meaning of A, B and m.
_UNSUPPORTED = (
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
    "alora_invocation_tokens",
)


def recognises(reader: Reader, parts: Collection[str]) -> bool:
    """Return True for names with PEFT's factors, or with PEFT's or NVlabs' magnitude."""
    return not _PARTS.isdisjoint(parts)


def read(reader: Reader, adapter_name: str | None = None) -> AdapterSet:
    """Describe the adapters of a PEFT folder.

    `adapter_name` chooses among the adapters of a state dict, such as "default".
    """
    where = config_path(reader)
    if not where.is_file():
        raise FileNotFoundError(
            f"{where}: no such file, and A and B of {reader.path.name} have PEFT's names: put the "
            "configuration of the training beside it; a file of diffusers must be named "
            "pytorch_lora_weights.safetensors"
        )
    config = read_json(where)
    if config.get("peft_type") in PRODUCTS:
        return _products(reader, config, where, adapter_name)
    parts, rest = sort_names(reader, adapter_name)
    rows = {name: match for name in rest if (match := _TOKENS.fullmatch(name))}
    whole, untrained = _whole_tensors(reader, [name for name in rest if name not in rows])
    tokens = token_rows(_by_module(reader, rows), config, where)
    trained = head(config, where)
    check_complete(reader.path, trained, whole, tokens, config)
    layers = adapted_layers(reader, parts, config, where)
    return AdapterSet(
        _format(config),
        reader,
        layers,
        whole,
        base_change(config, where),
        trained_biases(config, where),
        differences=bias_changes(parts, layers),
        tokens=tokens,
        untrained=untrained,
        beside={_copied_name(name): name for name in rest},
        head=trained,
        is_interleaved=_format(config) == "torchtune",
        base_name=str(config.get("base_model_name_or_path") or ""),
    )


def _products(
    reader: Reader, config: JsonObject, where: Path, adapter_name: str | None
) -> AdapterSet:
    """Describe the LoHa or LoKr adapters of a PEFT folder, which have no magnitudes."""
    parts: dict[str, dict[str, str]] = {}
    matches = {name: _PRODUCT.fullmatch(_bare(name)) for name in reader.tensors}
    rest = [name for name, match in matches.items() if match is None]
    adapters = {_adapter(match) for match in matches.values() if match is not None}
    if adapters:
        _check_choice(reader, adapters, adapter_name)
    for name, match in matches.items():
        if match is not None and adapter_name in (None, _adapter(match)):
            parts.setdefault(match["path"], {})[match["part"]] = name
    if not parts:
        raise CheckpointError(
            f"{where}: says peft_type {config['peft_type']}, but no tensor has a name of it"
        )
    found = {path: product(reader, path, own, None) for path, own in parts.items()}
    configs = layer_configs(found, config | {"lora_alpha": config.get("alpha")}, where)
    layers = {}
    for path, (names, shape, rank) in found.items():
        if isinstance(names, KroneckerNames):
            names = names._replace(is_of_peft=True)
        if rank not in (None, configs[path].rank):
            raise CheckpointError(
                f"{reader.path}: {path}: {CONFIG} says rank {configs[path].rank}, but its factors "
                f"have rank {rank}"
            )
        kind = LayerKind("conv" if len(shape) > 2 else "linear")
        layers[path] = StoredLayer(configs[path], kind, shape, names)
    whole, untrained = _whole_tensors(reader, rest)
    trained = head(config, where)
    check_complete(reader.path, trained, whole, (), config)
    return AdapterSet(NAME, reader, layers, whole, untrained=untrained, head=trained)


def _format(config: JsonObject) -> str:
    """Return the name of the program whose configuration this is."""
    if _TORCHTUNE <= config.keys() <= _TORCHTUNE | {"use_dora"}:
        return "torchtune"
    return "nvlabs" if config.get("peft_type") == "DORA" else NAME


def adapted_layers(
    reader: Reader, parts: Mapping[str, Mapping[str, str]], config: JsonObject, where: Path
) -> dict[str, StoredLayer]:
    """Return the layers whose tensors `parts` names, as a configuration of PEFT describes them.

    Parameters
    ----------
    reader : Reader
    parts : mapping of str to mapping
        From `sort_names`: the names of A, B and m by module path and part.
    config : dict
        PEFT's configuration.
    where : Path
        The file that has it, for errors.
    """
    has_magnitudes = any("m" in names for names in parts.values())
    # torchtune's export has no entry for it.
    dora = flag("use_dora", config, where) or (config.keys() == _TORCHTUNE and has_magnitudes)
    peft_type = config.get("peft_type")
    if peft_type not in ("LORA", "DORA"):
        raise CheckpointError(
            f"{where}: peft_type must be LORA, DORA, LOHA or LOKR, got {peft_type!r}"
        )
    unsupported = (*_UNSUPPORTED, "lora_bias") if dora else _UNSUPPORTED
    found = [name for name in unsupported if config.get(name)]
    if found:
        raise CheckpointError(f"{where}: {', '.join(found)} cannot be merged")
    stacks = _stacks(reader, parts)
    others = {path: names for path, names in parts.items() if path not in stacks}
    empty = {"target_parameters": None} if stacks else {}  # they are those of the header
    modules, targets = parameters(others, config | empty, where)
    names = _complete_names(reader, modules, where, dora=dora or peft_type == "DORA")
    of_targets = _complete_names(reader, targets, where, dora="m" in set().union(*targets.values()))
    configs = layer_configs([*names, *targets, *stacks], config, where)
    transposed = flag("fan_in_fan_out", config, where)
    layers = {
        path: _layer(reader, path, names[path], configs[path], transposed=transposed)
        for path in names
    }
    for path, own in of_targets.items():
        module = path.removesuffix(".weight")
        if is_matrix(path):
            layers[module] = _layer(reader, path, own, configs[path], transposed=False)
        else:
            layers[path] = stack_layer(reader, path, targets[path], configs[path], config)
    for path, kind in stacks.items():
        layers[path] = expert_layer(reader, path, parts[path], configs[path], kind)
    return layers


def _stacks(reader: Reader, parts: Mapping[str, Mapping[str, str]]) -> dict[str, LayerKind]:
    """Return the kinds of the parameters in doraxp's layout of experts."""
    stacks = kinds(reader)
    foreign = next((path for path in stacks if path not in parts), None)
    if foreign is not None:
        raise CheckpointError(
            f"{reader.path}: experts of the entry doraxp of the header has {foreign}, and the file "
            "has no adapter of that name: save the adapter again"
        )
    return stacks


def bias_changes(
    parts: Mapping[str, Mapping[str, str]], layers: Mapping[str, StoredLayer]
) -> dict[str, Added]:
    """Return the biases of B, which PEFT's ``lora_bias`` adds to those of the base, times s."""
    return {
        f"{path}.bias": Added(names["bias"], layers[path].config.scaling)
        for path, names in parts.items()
        if "bias" in names
    }


def sort_names(
    reader: Reader, adapter_name: str | None
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return the names of A, B and m by module path and part, and the names of whole tensors."""
    matches = {name: _NAME.fullmatch(_bare(name)) for name in reader.tensors}
    rest = [name for name, match in matches.items() if match is None]
    adapters = {_adapter(match) for match in matches.values() if match is not None}
    _check_choice(reader, adapters, adapter_name)
    others = {one for one in adapters if adapter_name is not None and one != adapter_name}
    rest = [name for name in rest if not any(_is_of(one, name) for one in others)]
    parts: dict[str, dict[str, str]] = {}
    for name, match in matches.items():
        if match is None or adapter_name not in (None, _adapter(match)):
            continue
        part = next(part for part in ("a", "bias", "b", "m") if match[part])
        names = parts.setdefault(match["path"], {})
        if part in names and not are_equal(Source(reader, name), Source(reader, names[part])):
            raise CheckpointError(f"{reader.path}: {name} and {names[part]} name the same tensor")
        names[part] = name
    return parts, rest


def _check_choice(reader: Reader, adapters: Collection[str], adapter_name: str | None) -> None:
    """Raise CheckpointError unless one of the adapters in a file is chosen, or it has one alone."""
    names = ", ".join(sorted(adapters))
    if adapter_name is None and len(adapters) > 1:
        raise CheckpointError(
            f"{reader.path}: has the adapters {names}: choose one with --adapter-name NAME"
        )
    if adapter_name is not None and adapter_name not in adapters:
        raise CheckpointError(
            f"{reader.path}: adapter_name must be one of {names}, got {adapter_name!r}"
        )


def _adapter(match: re.Match[str]) -> str:
    """Return the name of the adapter that a tensor is of; a file may leave "default" out."""
    return match["name"] or "default"


def _is_of(adapter: str, name: str) -> bool:
    """Return whether a tensor beside the factors is one of an adapter, by its name."""
    is_rows = _TOKENS.fullmatch(name) and name.endswith(f".{adapter}")
    return bool(is_rows) or f".modules_to_save.{adapter}." in name


def _by_module(reader: Reader, rows: Mapping[str, re.Match[str]]) -> dict[str, str]:
    """Return the name of the rows of each module's tokens."""
    found: dict[str, str] = {}
    for name, match in rows.items():
        other = found.setdefault(_base_name(match["module"]), name)
        if other != name:
            raise CheckpointError(
                f"{reader.path}: {other} and {name} are both for {_base_name(match['module'])}: "
                "remove the one that is of another adapter"
            )
    return found


def _copied_name(name: str) -> str:
    """Return the name that PEFT loads of a tensor that is not A, B or m.

    PEFT itself writes ``embed_tokens.modules_to_save.weight`` beside ``embed_tokens.weight``. In a
    state dict the name of the adapter comes before the leaf.
    """
    if re.search(r"\.modules_to_save\.[^.]+\.", name):
        return f"{PREFIX}{_base_name(name)}"
    rows = _TOKENS.fullmatch(name)
    return f"{rows['module']}.token_adapter.trainable_tokens_delta" if rows else name


def _bare(name: str) -> str:
    """Return a name without what PEFT puts before the names of the model's modules."""
    return name[match.end() :] if (match := _AROUND.match(name)) else name


def _whole_tensors(reader: Reader, names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the file's name of each whole tensor, and of each untrained one, by the base's name.

    With ``save_embedding_layers``, PEFT saves a trained embedding under two names, and beside it
    the one of before the training.
    """
    found: dict[str, str] = {}
    before: dict[str, str] = {}
    for name in names:
        if _BEFORE.search(name):
            before[_base_name(_BEFORE.sub("", name))] = name
            continue
        own = _base_name(name)
        if own in found and not are_equal(Source(reader, name), Source(reader, found[own])):
            raise CheckpointError(
                f"{reader.path}: {found[own]} and {name} are both for {own}, and differ: remove "
                "the one that is out of date"
            )
        found.setdefault(own, name)
    alone = {_base_name(name): name for own, name in before.items() if own not in found}
    return found | alone, {own: name for own, name in before.items() if own in found}


def _base_name(name: str) -> str:
    """Return the base's name of a whole tensor in the file."""
    last = re.sub(
        r"\.((token_adapter\.)?base_layer|modules_to_save(\.[^.]+)?)(?=\.[^.]+$)", "", _bare(name)
    )
    return re.sub(r"\.modules_to_save(\.default)?(?=\.)", "", last)


def _complete_names(
    reader: Reader, parts: Mapping[str, Mapping[str, str]], where: Path, *, dora: bool
) -> dict[str, TensorNames]:
    """Return the names of A, B and m by module path.

    PEFT ignores without a word a magnitude that ``use_dora`` denies, and takes the norms of the
    base for one that is missing. Both are errors here.
    """
    with_m = [path for path, names in parts.items() if "m" in names]
    without = [path for path, names in parts.items() if "m" not in names]
    if not dora and with_m:
        found = counted(len(with_m), "magnitude")
        raise CheckpointError(
            f"{reader.path}: the file has {found}, but {where.name} says use_dora "
            "false, so PEFT leaves them out: set it to true if DoRA was trained"
        )
    if dora and without:
        raise CheckpointError(
            f"{reader.path}: {where.name} says use_dora true, but the magnitude is missing of "
            f"{', '.join(without)}"
        )
    for path, names in parts.items():
        if not {"a", "b"} <= names.keys():
            raise CheckpointError(f"{reader.path}: {path} must have lora_A and lora_B")
    return {
        path: TensorNames(names["a"], names["b"], names.get("m")) for path, names in parts.items()
    }


def _layer(
    reader: Reader, path: str, names: TensorNames, own: Config, *, transposed: bool
) -> StoredLayer:
    a, b = (reader.tensors[name].shape for name in (names.lora_a, names.lora_b))
    if len(a) < 2 or len(b) != len(a) or 0 in (*a, *b):
        raise CheckpointError(
            f"{reader.path}: {path}: lora_A must have shape (rank, in, ...) and lora_B "
            f"(out, rank, ...), got {a} and {b}"
        )
    if len(a) > 2 and b[1] != a[0]:
        raise CheckpointError(
            f"{reader.path}: {path} is a grouped convolution: PEFT's lora_A reads the channels of "
            "all groups, so no grouped weight can act as it does"
        )
    if own.rank != a[0]:
        raise CheckpointError(
            f"{reader.path}: {path}: {CONFIG} says rank {own.rank}, but lora_A has shape {a}"
        )
    kind = LayerKind()
    shape: tuple[int, ...] = (b[0], a[1])
    if ".lora_embedding_A" in names.lora_a:
        kind, shape = LayerKind("embedding"), (a[1], b[0])
    elif len(a) > 2:
        kind, shape = LayerKind("conv"), (b[0], *a[1:])
    elif transposed:
        kind, shape = LayerKind("transposed"), (a[1], b[0])
    return StoredLayer(own, kind, shape, names)
