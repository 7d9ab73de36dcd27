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
    tried = (
        (weight, *adapter),  # as in the files
        (stored, *adapter),  # the model is loaded in the dtype in which it is saved
        (stored, stored, stored, adapter[-1]),
        (stored,) * 4,
        (coarse,) * 4,
    )
    return [
        tuple(DTYPES[name] for name in one)
        for one in dict.fromkeys(tried)
        if (_is_narrow(one[0]) and one[0] != weight) or all(map(_is_narrow, one[1:3]))
    ]


def rounds_norms(way: Way) -> bool:
    """Return whether n has 16 bits."""
    weight, lora_a, lora_b, _ = way
    return weight == lora_a == lora_b and weight.itemsize == 2


def _is_narrow(name: str) -> bool:
    return DTYPES[name].itemsize == 2
