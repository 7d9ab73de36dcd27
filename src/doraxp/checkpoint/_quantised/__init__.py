"""Quantised weights: one module a format, and the registry of all of them."""

from __future__ import annotations

from collections.abc import Mapping

from doraxp._base.safetensors import Tensor
from doraxp.checkpoint._quantised import bitsandbytes, compressed_tensors, fp8
from doraxp.checkpoint._quantised.protocol import (
    Fetch,
    Quantisation,
    QuantisedFormat,
    Refused,
    Settings,
)

FORMATS: tuple[QuantisedFormat, ...] = (fp8, bitsandbytes, compressed_tensors)
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
    for one in FORMATS:
        for name, how in one.find(tensors, settings, fetch):
            if name in found:
                msg = f"two formats claim {name}"
                raise AssertionError(msg)
            found[name] = how
    return found
