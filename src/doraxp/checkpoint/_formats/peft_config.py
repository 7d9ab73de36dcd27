"""PEFT's ``adapter_config.json``: the entries that a merge depends on."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path

from doraxp._base.patterns import values_by_path
from doraxp._base.scalars import check_count, check_number
from doraxp._base.types import Config
from doraxp.checkpoint._adapters import CONFIG, NewHead, TokenRows
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._formats.peft_writing import whole_path
from doraxp.checkpoint._json import JsonObject, read_json
from doraxp.checkpoint._tied import is_head

# The values of ``init_lora_weights`` that change the base weights, and those that do not.
_CHANGES_BASE = re.compile(r"(pissa.*|olora|loftq|corda.*|lora_ga)", re.IGNORECASE)
_KEEPS_BASE = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")

# The modules that PEFT saves for a task, whether the model has them or not.
_HEADS_OF_TASKS = ("classifier", "score", "qa_outputs")


def flag(name: str, config: JsonObject, where: Path) -> bool:
    """Return an entry that is true, false or null; raise CheckpointError for another value."""
    flag = config.get(name) or False  # null too
    if not isinstance(flag, bool):
        raise CheckpointError(f"{where}: {name} must be true or false, got {flag!r}")
    return flag


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


def head(config: JsonObject, where: Path) -> NewHead:
    """Return the head that was trained with the adapter, by the files beside it."""
    modules = config.get("modules_to_save") or []
    mapping = config.get("auto_mapping") or {}
    task = config.get("task_type")
    beside = where.parent / "config.json"
    model = read_json(beside) if beside.is_file() else {}
    architectures = model.get("architectures") or []
    trained = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    first = architectures[0] if isinstance(architectures, list) and architectures else trained
    return NewHead(
        tuple(map(str, modules)) if isinstance(modules, list) else (str(modules),),
        task if isinstance(task, str) else None,
        first if isinstance(first, str) else None,
        _labels(model.get("id2label")),
    )


def _labels(labels: object) -> tuple[str, ...]:
    """Return the names of the classes, by their numbers; nothing where the entry has others."""
    if not isinstance(labels, dict) or not all(str(key).isdecimal() for key in labels):
        return ()
    return tuple(str(labels[key]) for key in sorted(labels, key=int))


def token_rows(names: Mapping[str, str], config: JsonObject, where: Path) -> dict[str, TokenRows]:
    """Return the single rows of embeddings in a file, by the embeddings' name.

    `names` has the name of the rows' tensor by that of the embeddings' module.
    """
    indices = config.get("trainable_token_indices") or {}  # null too
    found = {}
    for module, name in names.items():
        rows = indices
        if isinstance(indices, dict):
            own = [key for key in indices if f".{module}".endswith(f".{key}")]
            if not own and is_head(f"{module}.weight"):
                own = list(indices)  # a tied head has the embeddings' rows, and no entry
            rows = indices.get(next(iter(own), None))
        if (
            not isinstance(rows, list)
            or len(set(rows)) < len(rows)
            or not all(isinstance(row, int) and row >= 0 for row in rows)
        ):
            raise CheckpointError(
                f"{where}: trainable_token_indices must have the tokens of {module}, each once, "
                f"got {rows!r}"
            )
        found[f"{module}.weight"] = TokenRows(tuple(rows), name)
    return found


def check_complete(
    path: Path,
    trained: NewHead,
    whole: Collection[str],
    tokens: Collection[str],
    config: JsonObject,
) -> None:
    """Raise CheckpointError where a file lacks tensors that the configuration names.

    Parameters
    ----------
    path : Path
        The file.
    trained : NewHead
    whole : collection of str
        The names of the tensors that the file has in full.
    tokens : collection of str
        Those of the embeddings of which it has single rows.
    config : dict
        PEFT's configuration.
    """
    modules = tuple(name for name in trained.modules if name not in _HEADS_OF_TASKS)
    named = trained._replace(modules=modules)
    lacking = []
    if modules and all(named.place_in(name) is None for name in whole):
        lacking.append(f"modules_to_save {', '.join(modules)}")
    if config.get("trainable_token_indices") and not tokens:
        lacking.append("trainable_token_indices")
    if lacking:
        raise CheckpointError(
            f"{path}: {CONFIG} says {' and '.join(lacking)}, but the file has no tensors of them: "
            "save the adapter again from the trained model"
        )


def layer_configs(paths: Collection[str], config: JsonObject, where: Path) -> dict[str, Config]:
    """Return the numbers of each module, by the patterns of the configuration as PEFT matches."""
    rslora = flag("use_rslora", config, where)
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
