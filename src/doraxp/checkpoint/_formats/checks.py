"""Checks that several formats share: names, factors, rank and form."""

from __future__ import annotations

from collections.abc import Mapping

from doraxp._base.types import Config
from doraxp.checkpoint._adapters import TensorNames
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._safetensors import Reader
from doraxp.layers import AdaptedLayer


def names_by_module(reader: Reader, ends: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return the names of each module's tensors, by part.

    `ends` maps the end of a name to the part that it stands for: "a", "b", "m" or "alpha". A name
    with another end is an error.
    """
    modules: dict[str, dict[str, str]] = {}
    for name in reader.tensors:
        end = next((end for end in ends if name.endswith(f".{end}")), None)
        if end is None:
            raise CheckpointError(f"{reader.path}: {name} is not part of a DoRA adapter")
        parts = modules.setdefault(name.removesuffix(f".{end}"), {})
        if ends[end] in parts:
            raise CheckpointError(
                f"{reader.path}: {parts[ends[end]]} and {name} are the same part of one adapter: "
                "remove the one that is out of date"
            )
        parts[ends[end]] = name
    return modules


def complete_names(reader: Reader, path: str, names: Mapping[str, str]) -> TensorNames:
    """Return the names of A, B and m; raise CheckpointError where one is missing."""
    missing = [part for part in "abm" if part not in names]
    if missing == ["m"]:
        raise CheckpointError(f"{reader.path}: {path} has no magnitude: it is LoRA, not DoRA")
    if missing:
        raise CheckpointError(f"{reader.path}: {path} must have both factors and a magnitude")
    return TensorNames(names["a"], names["b"], names["m"])


def checked_config(reader: Reader, path: str, rank: int, alpha: float | None) -> Config:
    """Return the numbers of a module; raise CheckpointError where `Config` refuses them."""
    try:
        return Config(rank, alpha)
    except ValueError as error:
        raise CheckpointError(f"{reader.path}: {path}: {error}") from None


def check_weight_form(path: str, layer: AdaptedLayer, target: str) -> None:
    """Raise ValueError unless an adapter has the form that the trainers' files hold."""
    if layer.config.form != "weight":
        raise ValueError(
            f"{path}: {target} has the weight form only, got {layer.config.form!r}: "
            "doraxp.convert_form(weight, adapter, config, 'weight') converts it, with the base's "
            "weight"
        )
