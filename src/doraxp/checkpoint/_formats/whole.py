"""The parts of an adapter's file that only PEFT's format can hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from doraxp._base.words import counted
from doraxp.checkpoint._adapters import AdapterSet, config_path
from doraxp.checkpoint._updated_layer import AnyLayer


def check_no_whole_tensors(adapters: Mapping[str, AnyLayer], target: str) -> None:
    """Raise ValueError if the training changed whole tensors or single rows too."""
    if not isinstance(adapters, AdapterSet):
        return
    beside = ", ".join(_beside(adapters))
    if beside:
        raise ValueError(
            f"{adapters.reader.path}: {target} has no place for whole tensors, but the file also "
            f"replaces {beside}: merge it into its base instead, with doraxp merge"
        )


def _beside(adapters: AdapterSet) -> Iterator[str]:
    """Yield a text for each whole tensor, and for the rows of each embedding."""
    yield from adapters.replacements
    for name, rows in adapters.tokens.items():
        yield f"rows of {counted(len(rows.indices), 'token')} of {name}"


def check_adapters_only(adapters: Mapping[str, AnyLayer], target: str) -> None:
    """Raise ValueError if the training changed more than the adapters.

    A merge refuses such a file where a part is missing. In another format nothing would tell it.
    """
    check_no_whole_tensors(adapters, target)
    if not isinstance(adapters, AdapterSet):
        return
    if adapters.base_change:
        raise ValueError(
            f"{adapters.reader.path}: the adapter was initialised by {adapters.base_change}, which "
            f"changed the base weights, and {target} has no entry for that: convert it to the "
            "format 'peft', which keeps the entry"
        )
    if adapters.trained_biases:
        raise ValueError(
            f"{config_path(adapters.reader)} says bias {adapters.trained_biases!r}, but the file "
            f"has no bias, and {target} has no entry for that: if the model has no biases, set "
            "bias to 'none' there and convert it again"
        )
