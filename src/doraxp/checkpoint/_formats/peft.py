"""PEFT's folders, and those of NVlabs' PEFT from before DoRA was merged into PEFT.

Both keep A, B and m of each module under the module's own name, whole tensors beside them
(biases, ``modules_to_save``), and the rest in ``adapter_config.json``.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from doraxp._base.patterns import values_by_path
from doraxp._base.scalars import check_count, check_number
from doraxp._base.types import Config
from doraxp._core.kinds import LayerKind
from doraxp.checkpoint._adapters import (
    CONFIG,
    AdapterSet,
    NewHead,
    StoredLayer,
    TensorNames,
    TokenRows,
    config_path,
)
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._formats.peft_writing import whole_path, write
from doraxp.checkpoint._json import JsonObject, read_json
from doraxp.checkpoint._safetensors import Reader, same_bytes

__all__ = [
    "FILE",
    "NAME",
    "adapted_layers",
    "base_change",
    "read",
    "recognises",
    "sort_names",
    "trained_biases",
    "write",
]

NAME, FILE = "peft", "adapter_model.safetensors"
_NAME = re.compile(
    r"(?P<path>.+)\.(?:(?P<a>lora_(?:embedding_)?A)|(?P<b>lora_(?:embedding_)?B)"
    r"|(?P<m>lora_magnitude_vector|weight_m_wdecomp))(?:\.(?!weight$)(?P<name>[^.]+))?(?:\.weight)?"
)
_PARTS = {"lora_A", "lora_embedding_A", "lora_magnitude_vector", "weight_m_wdecomp"}
_AROUND = re.compile(r"((module|_orig_mod)\.)*(base_model\.model\.)+")
_TORCHTUNE = {"r", "lora_alpha", "target_modules", "peft_type", "base_model_name_or_path"}
"""The entries of torchtune's export, which has no others."""
_TOKENS = ".token_adapter.trainable_tokens_delta"
_BEFORE = re.compile(r"\.original_module(?=\.[^.]+$)")
# The values of ``init_lora_weights`` that change the base weights, and those that do not.
_CHANGES_BASE = re.compile(r"(pissa.*|olora|loftq|corda.*|lora_ga)", re.IGNORECASE)
_KEEPS_BASE = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
# Each of these entries changes the meaning of A, B and m.
_UNSUPPORTED = (
    "layer_replication",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
    "alora_invocation_tokens",
    "target_parameters",
)


def recognises(reader: Reader, parts: Collection[str]) -> bool:
    """Return True for names with PEFT's factors, or with PEFT's or NVlabs' magnitude."""
    return not _PARTS.isdisjoint(parts)


def read(reader: Reader, adapter_name: str | None = None) -> AdapterSet:
    """Describe the adapters of a PEFT folder.

    `adapter_name` chooses among the adapters of a state dict, such as "default".
    """
    where = config_path(reader)
    config = read_json(where)
    parts, rest = sort_names(reader, adapter_name)
    tokens = _token_rows([name for name in rest if name.endswith(_TOKENS)], config, where)
    rest = [name for name in rest if not name.endswith(_TOKENS)]
    return AdapterSet(
        _format(config),
        reader,
        adapted_layers(reader, parts, config, where),
        _whole_tensors(reader, rest),
        base_change(config, where),
        trained_biases(config, where),
        tokens=tokens,
        ties_weights=_flag("ensure_weight_tying", config, where),
        head=_head(config, where),
        is_interleaved=_format(config) == "torchtune",
    )


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
    dora = _flag("use_dora", config, where) or (config.keys() == _TORCHTUNE and has_magnitudes)
    peft_type = config.get("peft_type")
    if peft_type not in ("LORA", "DORA"):
        raise CheckpointError(f"{where}: peft_type must be LORA or DORA, got {peft_type!r}")
    found = [name for name in _UNSUPPORTED if config.get(name)]
    if found:
        raise CheckpointError(f"{where}: {', '.join(found)} cannot be merged with a DoRA adapter")
    names = _complete_names(reader, parts, where, dora=dora or peft_type == "DORA")
    configs = _layer_configs(names, config, where)
    transposed = _flag("fan_in_fan_out", config, where)
    return {
        path: _layer(reader, path, names[path], configs[path], transposed=transposed)
        for path in names
    }


def _token_rows(names: Iterable[str], config: JsonObject, where: Path) -> dict[str, TokenRows]:
    """Return the single rows of embeddings in the file, by the embeddings' name."""
    indices = config.get("trainable_token_indices") or {}  # null too
    found = {}
    for name in names:
        own = f"{_base_name(name.removesuffix(_TOKENS))}.weight"
        module = own.removesuffix(".weight")
        rows = indices
        if isinstance(indices, dict):
            # A head that is tied to the embeddings has their rows, and no entry.
            other = next(iter(indices)) if len(indices) == 1 else None
            key = next((key for key in indices if f".{module}".endswith(f".{key}")), other)
            rows = indices.get(key)
        if (
            not isinstance(rows, list)
            or len(set(rows)) < len(rows)
            or not all(isinstance(row, int) and row >= 0 for row in rows)
        ):
            raise CheckpointError(
                f"{where}: trainable_token_indices must have the tokens of {module}, each once, "
                f"got {rows!r}"
            )
        found[own] = TokenRows(tuple(rows), name)
    return found


def _head(config: JsonObject, where: Path) -> NewHead:
    """Return what the files beside the adapter say of the head that was trained with it."""
    modules = config.get("modules_to_save") or []
    mapping = config.get("auto_mapping") or {}
    task = config.get("task_type")
    beside = where.parent / "config.json"
    model = read_json(beside) if beside.is_file() else {}
    labels = model.get("id2label") or {}
    architectures = model.get("architectures") or []
    trained = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    first = architectures[0] if isinstance(architectures, list) and architectures else trained
    return NewHead(
        tuple(map(str, modules)) if isinstance(modules, list) else (str(modules),),
        task if isinstance(task, str) else None,
        first if isinstance(first, str) else None,
        tuple(map(str, labels.values())) if isinstance(labels, dict) else (),
    )


def base_change(config: JsonObject, where: Path) -> str | None:
    """Return the initialisation if it changed the base weights, else None."""
    name = str(config.get("init_lora_weights"))
    if name.lower() in _KEEPS_BASE:
        return None
    if _CHANGES_BASE.fullmatch(name) is None:
        raise CheckpointError(
            f"{where}: init_lora_weights {name!r} is unknown: it may have changed the base"
        )
    return name


def trained_biases(config: JsonObject, where: Path) -> str | None:
    """Return "all" or "lora_only" if biases were trained, else None."""
    bias = config.get("bias")
    if bias is None or bias == "none":
        return None
    if isinstance(bias, str) and bias in ("all", "lora_only"):
        return bias
    raise CheckpointError(f"{where}: bias must be 'none', 'all' or 'lora_only', got {bias!r}")


def _flag(name: str, config: JsonObject, where: Path) -> bool:
    flag = config.get(name) or False  # null too
    if not isinstance(flag, bool):
        raise CheckpointError(f"{where}: {name} must be true or false, got {flag!r}")
    return flag


def sort_names(
    reader: Reader, adapter_name: str | None
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return the names of A, B and m by module path and part, and the names of whole tensors."""
    matches = {name: _NAME.fullmatch(_bare(name)) for name in reader.tensors}
    rest = [name for name, match in matches.items() if match is None]
    adapters = sorted({_adapter(match) for match in matches.values() if match is not None})
    if adapter_name is None and len(adapters) > 1:
        raise CheckpointError(
            f"{reader.path}: has the adapters {', '.join(adapters)}: choose one with "
            "--adapter-name NAME"
        )
    if adapter_name is not None and adapter_name not in adapters:
        raise CheckpointError(
            f"{reader.path}: adapter_name must be one of {', '.join(adapters)}, got "
            f"{adapter_name!r}"
        )
    parts: dict[str, dict[str, str]] = {}
    for name, match in matches.items():
        if match is None or adapter_name not in (None, _adapter(match)):
            continue
        part = next(part for part in "abm" if match[part])
        names = parts.setdefault(match["path"], {})
        if part in names and not _equal(reader, name, names[part]):
            raise CheckpointError(f"{reader.path}: {name} and {names[part]} name the same tensor")
        names[part] = name
    return parts, rest


def _adapter(match: re.Match[str]) -> str:
    """Return the name of the adapter that a tensor is of; a file may leave "default" out."""
    return match["name"] or "default"


def _bare(name: str) -> str:
    """Return a name without what PEFT puts before the names of the model's modules."""
    return _AROUND.sub("", name)


def _whole_tensors(reader: Reader, names: Iterable[str]) -> dict[str, str]:
    """Return the file's name of each whole tensor, by its name in the base.

    With ``save_embedding_layers``, PEFT saves a trained embedding under two names, and beside it
    the one of before the training, which is left out here.
    """
    found: dict[str, str] = {}
    before = []
    for name in names:
        if _BEFORE.search(name):
            before.append(name)
            continue
        own = _base_name(name)
        if own in found and not _equal(reader, name, found[own]):
            raise CheckpointError(
                f"{reader.path}: {found[own]} and {name} are both for {own}, and differ: remove "
                "the one that is out of date"
            )
        found.setdefault(own, name)
    return found | {
        _base_name(name): name for name in before if _base_name(_BEFORE.sub("", name)) not in found
    }


def _base_name(name: str) -> str:
    """Return the base's name of a whole tensor in the file."""
    return re.sub(
        r"\.((token_adapter\.)?base_layer|modules_to_save(\.[^.]+)?)(?=\.[^.]+$)", "", _bare(name)
    )


def _equal(reader: Reader, one: str, other: str) -> bool:
    """Return whether two tensors have the same bytes."""
    pairs = zip(reader.chunks(one), reader.chunks(other), strict=True)
    return reader.tensors[one] == reader.tensors[other] and all(
        same_bytes(first, second) for first, second in pairs
    )


def _complete_names(
    reader: Reader, parts: Mapping[str, Mapping[str, str]], where: Path, *, dora: bool
) -> dict[str, TensorNames]:
    """Return the names of A, B and m by module path.

    PEFT ignores without a word a magnitude that ``use_dora`` denies, and one that is missing. Both
    are errors here.
    """
    with_m = [path for path, names in parts.items() if "m" in names]
    without = [path for path, names in parts.items() if "m" not in names]
    if not dora and with_m:
        raise CheckpointError(
            f"{reader.path}: the file has {len(with_m)} magnitudes, but {where.name} says use_dora "
            "false, so PEFT leaves them out: set it to true if DoRA was trained"
        )
    if not dora:
        raise CheckpointError(f"{reader.path}: a LoRA adapter, without magnitudes: not DoRA")
    if without:
        raise CheckpointError(
            f"{reader.path}: {where.name} says use_dora true, but the magnitude is missing of "
            f"{', '.join(without)}"
        )
    for path, names in parts.items():
        if set(names) != {"a", "b", "m"}:
            raise CheckpointError(f"{reader.path}: {path} must have lora_A, lora_B and a magnitude")
    return {path: TensorNames(names["a"], names["b"], names["m"]) for path, names in parts.items()}


def _layer(
    reader: Reader, path: str, names: TensorNames, own: Config, *, transposed: bool
) -> StoredLayer:
    a, b = (reader.tensors[name].shape for name in names[:2])
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


def _layer_configs(paths: Collection[str], config: JsonObject, where: Path) -> dict[str, Config]:
    """Return the numbers of each module, by the patterns of the configuration as PEFT matches."""
    rslora = _flag("use_rslora", config, where)
    configs: dict[str, Config] = {}
    try:
        ranks, alphas = (_pattern(f"{name}_pattern", config) for name in ("rank", "alpha"))
        # Python warns of sets of letters whose meaning may change.
        with warnings.catch_warnings(action="ignore"):
            ranks, alphas = (_values(pattern, paths) for pattern in (ranks, alphas))
        for path in paths:
            # PEFT takes a negative alpha as it is, and null as 8. In Config both mean the rank,
            # so both are refused here.
            alpha = check_number(
                "lora_alpha", alphas.get(path, config.get("lora_alpha")), positive=True
            )
            rank = check_count("rank", ranks.get(path, config.get("r", 0)), least=1)
            configs[path] = Config(rank, alpha, rslora=rslora)
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{where}: {error}") from None
    return configs


def _pattern(name: str, config: JsonObject) -> JsonObject:
    pattern = config.get(name) or {}  # null too
    if not isinstance(pattern, dict):
        raise TypeError(f"{name} must be an object of patterns and numbers, got {pattern!r}")
    return pattern


def _values(pattern: JsonObject, paths: Collection[str]) -> JsonObject:
    """Return the value of each path that a key of the pattern matches: that of the first one.

    A file that `write` made may have a key for each of many thousand modules. Such a key is found
    by itself, because an automaton of all of them would be too large.
    """
    if not pattern:
        return {}
    places = {key: place for place, key in enumerate(pattern)}
    exact = {path: places[key] for path in paths if (key := whole_path(path)) in places}
    keys = {whole_path(path) for path in exact}
    others = values_by_path({key: places[key] for key in pattern if key not in keys}, paths)
    values = list(pattern.values())
    last = len(values)
    return {
        path: values[min(exact.get(path, last), others.get(path, last))] for path in exact | others
    }
