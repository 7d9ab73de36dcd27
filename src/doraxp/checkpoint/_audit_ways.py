"""The dtypes in which a tool may merge: it need not load W, A, B and m as they are in the files."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from doraxp.checkpoint._audit_sample import Dtypes
from doraxp.checkpoint._precision import PRECISION
from doraxp.checkpoint._safetensors import DTYPES

Way: TypeAlias = tuple[np.dtype[Any], ...]
"""The dtypes of W, A, B and m in a tool's memory. Each step has the wider dtype of its operands."""


def ways(dtypes: Dtypes) -> list[Way]:
    """Return the ways of merging in which a step before the last one is rounded to 16 bits."""
    stored, weight, *adapter = dtypes
    coarse = max(dtypes, key=lambda name: PRECISION[name].epsilon)
    tried = [
        (weight, *adapter),  # as in the files
        (stored, stored, stored, adapter[-1]),
    ]
    # A tool may load the model in the dtype in which it saves it, and the adapter in any.
    for name in (stored, coarse):
        tried += [(name, *adapter), (name, "F32", "F32", "F32"), (name,) * 4]
    return [
        tuple(DTYPES[name] for name in way)
        for way in dict.fromkeys(tried)
        if (_is_narrow(way[0]) and way[0] != weight) or all(map(_is_narrow, way[1:3]))
    ]


def norms_are_coarse(way: Way | None, stored: str) -> bool:
    """Return whether n is rounded to 16 bits, or S has as many bits as n."""
    if way is None or len({*way[:3]}) > 1:
        return not _is_narrow(stored)
    return way[0].itemsize <= DTYPES[stored].itemsize


def _is_narrow(name: str) -> bool:
    return DTYPES[name].itemsize == 2
