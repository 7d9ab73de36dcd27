"""PEFT's format, and NVlabs' from before it: what the names and the configuration mean."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from doraxp._base.patterns import values_by_path
from doraxp._base.scalars import check_number
from doraxp._base.types import Adapter, Config
from doraxp._core.kinds import LayerKind
from doraxp.checkpoint._adapters import AdapterSet, StoredLayer
from doraxp.checkpoint._safetensors import CheckpointError, Reader

PREFIX = "base_model.model."
_NAME = re.compile(
    r"(?P<path>.+)\.(?:(?P<a>lora_(?:embedding_)?A)|(?P<b>lora_(?:embedding_)?B)"
    r"|(?P<m>lora_magnitude_vector|weight_m_wdecomp))(?:\.default)?(?:\.weight)?"
)
# By their ``init_lora_weights``.
_CHANGES_BASE = re.compile(r"(pissa.*|olora|loftq|corda.*|lora_ga)", re.IGNORECASE)
_KEEPS_BASE = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
_MATCH_LIMIT = 2e9
"""Steps of the regular expressions, each some 10 ns."""
# Each changes what the three tensors mean.
_UNSUPPORTED = (
    "layer_replication",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
    "alora_invocation_tokens",
    "target_parameters",
    "trainable_token_indices",
)


def read_peft(reader: Reader, config: Mapping[str, Any]) -> AdapterSet:
    """Describe the adapters of a PEFT file with its ``adapter_config.json``."""
    where = reader.path.parent / "adapter_config.json"
    dora = _flag("use_dora", config, reader)
    if config.get("peft_type") not in ("LORA", "DORA"):
        raise CheckpointError(
            f"{where}: peft_type must be LORA or DORA, got {config.get('peft_type')!r}"
        )
    found = [name for name in _UNSUPPORTED if config.get(name)]
    if found:
        raise CheckpointError(f"{where}: {', '.join(found)} cannot be merged with a DoRA adapter")
    parts, rest = _sort_names(reader)
    _check_flag(reader, parts, dora=dora or config["peft_type"] == "DORA")
    configs = _layer_configs(reader, parts, config)
    transposed = _flag("fan_in_fan_out", config, reader)
    return AdapterSet(
        "nvlabs" if config["peft_type"] == "DORA" else "peft",
        reader,
        {
            path: _layer(reader, path, names, configs[path], transposed=transposed)
            for path, names in parts.items()
        },
        {_base_name(name): name for name in rest},
        _base_change(config, where),
        _trained_biases(config, where),
    )


def _base_change(config: Mapping[str, Any], where: Path) -> str | None:
    """Return the initialisation, if it changed the base."""
    name = str(config.get("init_lora_weights"))
    if name.lower() in _KEEPS_BASE:
        return None
    if _CHANGES_BASE.fullmatch(name) is None:
        raise CheckpointError(
            f"{where}: init_lora_weights {name!r} is not known: it may have changed the base"
        )
    return name


def _trained_biases(config: Mapping[str, Any], where: Path) -> str | None:
    """Return which biases were trained, if any."""
    bias = config.get("bias")
    if bias not in (None, "none", "all", "lora_only"):
        raise CheckpointError(f"{where}: bias must be none, all or lora_only, got {bias!r}")
    return None if bias == "none" else bias


def _flag(name: str, config: Mapping[str, Any], reader: Reader) -> bool:
    flag = config.get(name) or False  # null too
    if not isinstance(flag, bool):
        where = reader.path.parent / "adapter_config.json"
        raise CheckpointError(f"{where}: {name} must be true or false, got {flag!r}")
    return flag


def _sort_names(reader: Reader) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return the names of A, B and m by path, and the other names."""
    parts: dict[str, dict[str, str]] = {}
    rest = []
    for name in reader.tensors:
        match = _NAME.fullmatch(name.removeprefix(PREFIX))
        if match is None:
            rest.append(name)
            continue
        names = parts.setdefault(match["path"], {})
        if match.lastgroup in names:
            raise CheckpointError(f"{reader.path}: {name} and {names[match.lastgroup]} are one")
        names[str(match.lastgroup)] = name
    return parts, rest


def _base_name(name: str) -> str:
    """Return what a full tensor in the file is called in the base."""
    name = name.removeprefix(PREFIX)
    return re.sub(r"\.(base_layer|modules_to_save(\.default)?)(?=\.[^.]+$)", "", name)


def _check_flag(reader: Reader, parts: Mapping[str, Mapping[str, str]], *, dora: bool) -> None:
    """Hold ``use_dora`` to the magnitudes that are there: PEFT ignores either in silence."""
    with_m = [path for path, names in parts.items() if "m" in names]
    without = [path for path, names in parts.items() if "m" not in names]
    if not dora and with_m:
        raise CheckpointError(
            f"{reader.path}: it has {len(with_m)} magnitudes, but adapter_config.json says "
            f"use_dora false, so PEFT leaves them out: set it to true if DoRA was trained"
        )
    if not dora:
        raise CheckpointError(f"{reader.path}: a LoRA adapter, without magnitudes: not DoRA")
    if without:
        raise CheckpointError(
            f"{reader.path}: adapter_config.json says use_dora true, but the magnitude is missing "
            f"of {', '.join(without)}"
        )
    for path, names in parts.items():
        if set(names) != {"a", "b", "m"}:
            raise CheckpointError(f"{reader.path}: {path} must have lora_A, lora_B and a magnitude")


def _layer(
    reader: Reader, path: str, names: Mapping[str, str], own: Config, *, transposed: bool
) -> StoredLayer:
    a, b = (reader.tensors[names[part]].shape for part in "ab")
    if len(a) < 2 or len(b) != len(a) or 0 in (*a, *b):
        raise CheckpointError(f"{reader.path}: {path}: lora_A {a} and lora_B {b} are no factors")
    if len(a) > 2 and b[1] != a[0]:
        raise CheckpointError(
            f"{reader.path}: {path} is a grouped convolution: PEFT's lora_A reads the channels of "
            "all groups, so no grouped weight can act as it does"
        )
    if own.rank != a[0]:
        raise CheckpointError(
            f"{reader.path}: {path}: adapter_config.json gives it rank {own.rank}, lora_A has {a}"
        )
    kind = LayerKind()
    shape: tuple[int, ...] = (b[0], a[1])
    if ".lora_embedding_A" in names["a"]:
        kind, shape = LayerKind("embedding"), (a[1], b[0])
    elif len(a) > 2:
        kind, shape = LayerKind("conv"), (b[0], *a[1:])
    elif transposed:
        kind, shape = LayerKind("transposed"), (a[1], b[0])
    return StoredLayer(own, kind, shape, Adapter(names["a"], names["b"], names["m"]))


def _layer_configs(
    reader: Reader, paths: Collection[str], config: Mapping[str, Any]
) -> dict[str, Config]:
    """Return rank and alpha of the modules, by the patterns and as PEFT matches them."""
    rslora = _flag("use_rslora", config, reader)
    configs: dict[str, Config] = {}
    try:
        ranks, alphas = (dict(config.get(f"{name}_pattern") or {}) for name in ("rank", "alpha"))
        _check_patterns([*ranks, *alphas], paths)
        with warnings.catch_warnings(action="ignore"):  # of what a set of letters may mean one day
            ranks, alphas = (values_by_path(pattern, paths) for pattern in (ranks, alphas))
        for path in paths:
            alpha = alphas.get(path, config.get("lora_alpha"))
            # PEFT takes a negative one as it is, and none is 8 there: in Config both mean the rank.
            check_number("lora_alpha", alpha, positive=True)
            configs[path] = Config(ranks.get(path, config.get("r", 0)), alpha, rslora=rslora)
    except (TypeError, ValueError, OverflowError, RecursionError, re.error) as error:
        raise CheckpointError(f"{reader.path.parent / 'adapter_config.json'}: {error}") from None
    return configs


def _check_patterns(keys: Sequence[str], paths: Collection[str]) -> None:
    """Refuse regular expressions that may take forever: they come from strangers."""
    longest, cost = max(map(len, paths), default=0), 0
    for key in keys:
        repeats = len(re.findall(r"(?<!\\)[*+{]", key))
        if re.search(r"\)[*+{?]", key) or repeats > 3:
            raise ValueError(f"the pattern {key!r} repeats too much")
        cost += len(paths) * max(100, longest**repeats)
    if cost > _MATCH_LIMIT:
        raise ValueError(f"its patterns take too long to match with {len(paths)} modules")
