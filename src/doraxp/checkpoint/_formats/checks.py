"""Checks that several formats share: names, factors, rank and form."""

from __future__ import annotations

from collections.abc import Mapping

from doraxp._base.types import Config
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._safetensors import Reader
from doraxp.checkpoint._update_names import TensorNames

_OTHERS = {
    **dict.fromkeys(("oft_blocks", "oft_diag", "oft_R.weight", "rescale"), "OFT"),
    **dict.fromkeys(("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"), "GLoRA"),
    **dict.fromkeys(("on_input", "ia3_l"), "IA3"),
    **dict.fromkeys(("lambda_layer", "q_layer.weight", "p_layer.weight"), "T-LoRA"),
    "boft_R": "BOFT",
}
"""The ends of names of other algorithms."""


def names_by_module(reader: Reader, ends: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return the names of each module's tensors, by part.

    `ends` maps the end of a name to the part that it stands for: "a", "b", "m" or "alpha". A name
    with another end is an error.
    """
    modules: dict[str, dict[str, str]] = {}
    for name in reader.tensors:
        end = next((end for end in ends if name.endswith(f".{end}")), None)
        if end is None:
            algorithm = next((_OTHERS[end] for end in _OTHERS if name.endswith(f".{end}")), None)
            problem = "is not part of an adapter that doraxp knows"
            if algorithm is not None:
                problem = f"is of {algorithm}, which doraxp cannot merge: its own trainer can"
            raise CheckpointError(f"{reader.path}: {name} {problem}")
        parts = modules.setdefault(name.removesuffix(f".{end}"), {})
        if ends[end] in parts:
            raise CheckpointError(
                f"{reader.path}: {parts[ends[end]]} and {name} are the same part of one adapter: "
                "remove the one that is out of date"
            )
        parts[ends[end]] = name
    return modules


def complete_names(reader: Reader, path: str, names: Mapping[str, str]) -> TensorNames:
    """Return the names of A, B and, where there is one, m; raise CheckpointError without A or B."""
    if not {"a", "b"} <= names.keys():
        raise CheckpointError(f"{reader.path}: {path} must have both factors")
    return TensorNames(names["a"], names["b"], names.get("m"))


def checked_config(reader: Reader, path: str, rank: int, alpha: float | None) -> Config:
    """Return the numbers of a module; raise CheckpointError where `Config` refuses them."""
    try:
        return Config(rank, alpha)
    except ValueError as error:
        raise CheckpointError(f"{reader.path}: {path}: {error}") from None


def check_weight_form(path: str, config: Config, target: str) -> None:
    """Raise ValueError unless an adapter has the form that the trainers' files hold."""
    if config.form != "weight":
        raise ValueError(
            f"{path}: {target} has the weight form only, got {config.form!r}: "
            "doraxp.convert_form(weight, adapter, config, 'weight') converts it, with the base's "
            "weight"
        )
