"""Choices of a `Config` that no trainer's configuration has: an entry of the file's header.

The entry "doraxp" of the safetensors metadata is a JSON object. Each of its values is one string
for all modules, or an object of strings by module; a module that is not in it has the default. The
value "experts" is of the layout that `experts` describes.
Other programs skip the entry without a word, so PEFT and mlx-lm load the file as before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from doraxp._base.types import Config
from doraxp.checkpoint._adapters import AdapterSet, StoredLayer
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._formats import experts
from doraxp.checkpoint._json import parse_json
from doraxp.checkpoint._updated_layer import AnyLayer

_KEY = experts.KEY
_NAMES = ("norm_gradient", "dropout", "form")
_DEFAULTS = {name: value for name, value in asdict(Config(1)).items() if name in _NAMES}


def with_choices(adapters: AdapterSet, given: Mapping[str, str | None]) -> AdapterSet:
    """Return the adapters with the choices of their file, and with those that are given."""
    own = _in_header(adapters)
    fixed = {name: value for name, value in given.items() if value is not None}
    if not own and not fixed:
        return adapters
    layers = {}
    for path, layer in adapters.layers.items():
        choices: dict[str, Any] = {
            name: value if isinstance(value, str) else value.get(path, _DEFAULTS[name])
            for name, value in own.items()
        }
        try:
            config = replace(layer.config, **choices)
        except ValueError as error:
            raise CheckpointError(f"{adapters.reader.path}: {path}: {error}") from None
        changed: dict[str, Any] = fixed
        layers[path] = layer._replace(config=replace(config, **changed))
    return replace(adapters, layers=layers)


def _in_header(adapters: AdapterSet) -> dict[str, str | dict[str, str]]:
    """Return the choices in the file's header, by name; raise CheckpointError for other content."""
    where = adapters.reader.path
    if _KEY not in adapters.reader.metadata:
        return {}
    found: dict[str, str | dict[str, str]] = {}
    for name, value in parse_json(adapters.reader.metadata[_KEY].encode(), where).items():
        if name == experts.NAME:
            continue
        if name not in _NAMES:
            raise CheckpointError(
                f"{where}: the entry doraxp of the header must have the names norm_gradient, "
                f"dropout, form and experts only, got {name}: update doraxp"
            )
        by_module = value if isinstance(value, dict) else {}
        if not isinstance(value, str | dict) or not all(
            isinstance(one, str) for one in by_module.values()
        ):
            raise CheckpointError(
                f"{where}: {name} must be a string, or an object of strings by module, got "
                f"{value!r}"
            )
        foreign = next((path for path in by_module if path not in adapters.layers), None)
        if foreign is not None:
            raise CheckpointError(
                f"{where}: {name} has an entry for {foreign}, and the file has no adapter of that "
                "name: remove the entry doraxp from the header"
            )
        found[name] = value if isinstance(value, str) else by_module
    if found.get("form", "weight") != "weight":
        raise CheckpointError(
            f"{where}: form must be 'weight' in a file, got {found['form']!r}: other programs "
            "would take the numbers for those of the weight form: doraxp.convert_form converts "
            "them, with the base weight"
        )
    return found


def metadata(adapters: Mapping[str, AnyLayer]) -> dict[str, str]:
    """Return the entry of a header for these adapters; nothing where all choices are the default.

    The form is left out: it is "weight" in every file.
    """
    layers: Mapping[str, StoredLayer | AnyLayer] = adapters
    if isinstance(adapters, AdapterSet):  # without a read of each adapter
        layers = adapters.layers
    choices: dict[str, Any] = {}
    stacks = {path: layer.kind for path, layer in layers.items() if layer.kind.is_stack}
    if stacks:
        choices[experts.NAME] = experts.entry(stacks)
    for name in ("norm_gradient", "dropout"):
        values: dict[str, str] = {
            path: getattr(layer.config, name) for path, layer in layers.items()
        }
        if len(set(values.values())) == 1:
            (value,) = set(values.values())
            choices |= {name: value} if value != _DEFAULTS[name] else {}
        else:
            other = {path: value for path, value in values.items() if value != _DEFAULTS[name]}
            choices[name] = other
    return {_KEY: json.dumps(choices, sort_keys=True)} if choices else {}


def without_choices(entries: Mapping[str, str]) -> dict[str, str]:
    """Return the entries of a header without that of `metadata`."""
    return {name: value for name, value in entries.items() if name != _KEY}
