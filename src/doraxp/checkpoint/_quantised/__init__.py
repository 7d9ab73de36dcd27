"""Quantised weights: one module a format, and the registry of all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from doraxp._base.safetensors import Tensor
from doraxp.checkpoint._quantised import (
    bitsandbytes_4bit,
    bitsandbytes_int8,
    compressed_tensors,
    fp8,
    mlx,
    mxfp4,
    refused,
)
from doraxp.checkpoint._quantised.protocol import (
    Fetch,
    Found,
    Quantisation,
    QuantisedFormat,
    Refused,
    Settings,
)

FORMATS: tuple[QuantisedFormat, ...] = (
    fp8,
    bitsandbytes_4bit,
    bitsandbytes_int8,
    compressed_tensors,
    mlx,
    mxfp4,
)
"""The formats whose weights can be merged into."""


def find(
    tensors: Mapping[str, Tensor], settings: Settings, fetch: Fetch
) -> dict[str, Quantisation | Refused]:
    """Return the quantised weights of a model by their names.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        The entries of all tensors of the model.
    settings : Settings
        The words of its config.json.
    fetch : Fetch
        Reads tensors of the model.

    Returns
    -------
    dict of str to Quantisation or Refused
        The keys are the names that the weights would have if they were not quantised.
    """
    found: dict[str, Quantisation | Refused] = {}
    rest = dict(tensors)
    for one in FORMATS:
        _add(found, one.find(tensors, settings, fetch))
    for how in found.values():
        for name in how.tensors:
            rest.pop(name, None)
    _add(found, refused.find(rest, settings, fetch))
    return found


def _add(found: dict[str, Quantisation | Refused], more: Iterable[Found]) -> None:
    """Add weights, and refuse those that were found before."""
    for name, how in more:
        if name in found:
            both = tuple(dict.fromkeys(found[name].tensors + how.tensors))
            how = Refused(both, f"is quantised in two ways, by the names of its tensors: {both}")
        found[name] = how
