"""Quantised weights: one module a format, and the registry of all of them."""

from __future__ import annotations

from collections.abc import Mapping

from doraxp._base.safetensors import Tensor
from doraxp.checkpoint._quantised.declared import declared
from doraxp.checkpoint._quantised.protocol import (
    Fetch,
    Quantisation,
    Quantised,
    Quantiser,
    Refused,
    Settings,
)
from doraxp.checkpoint._quantised.reader import QuantisedReader, quantised_in
from doraxp.checkpoint._quantised.settings import settings_of

__all__ = [
    "Fetch",
    "Quantisation",
    "Quantised",
    "QuantisedReader",
    "Quantiser",
    "Refused",
    "Settings",
    "declared",
    "find",
    "quantised_in",
    "settings_of",
]


def find(
    tensors: Mapping[str, Tensor], settings: Settings, fetch: Fetch
) -> dict[str, Quantisation | Refused]:
    """Return the quantised weights of a model, by the names that they would have in 16 bits."""
    return {}
