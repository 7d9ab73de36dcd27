"""One case of the catalogue: a layer or an optimizer, with all of its numbers.

    weight (*stack, out, in)   lora_a (*stack, rank, in)   lora_b (*stack, out, rank)
    magnitude, bias (*stack, out)    x (*stack, ..., in)   dy (*stack, ..., out)
    dropout_mask, of x's shape: 0, or 1/(1 − p) with p = 1/5

The arrays are NumPy's and hold float64. `Case.stored` rounds them to a storage dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from doraxp._base.types import Config

FULL = ("float32", "float64")
HALF = ("float16", "bfloat16")
ADAPTER = ("lora_a", "lora_b", "magnitude")


@dataclass(frozen=True, eq=False)
class Case:
    """One layer with its inputs, as NumPy arrays.

    Parameters
    ----------
    name : str
    reason : str
        The mistake that the case finds.
    config : Config
    arrays : mapping of str to array
        x, weight, lora_a, lora_b, magnitude and dy; in some cases also bias and dropout_mask.
    dtypes : tuple of str
        The storage dtypes to run in. The adapter is always in the compute dtype.
    extreme : bool
        Whether the formulas as written divide 0 by 0, or have squares that overflow or underflow.
    since : int
        The version of the catalogue that brought the case.
    """

    name: str
    reason: str
    config: Config
    arrays: Mapping[str, Any] = field(repr=False)
    dtypes: tuple[str, ...] = FULL
    extreme: bool = False
    since: int = 1

    def stored(self, dtype: str) -> dict[str, Any]:
        """Return the arrays rounded to a storage dtype, and the adapter to the compute dtype.

        Numbers of float16 and bfloat16 are returned in float32, which holds them exactly.
        """
        wide = compute_dtype_name(dtype)
        return {
            name: (array if name in ADAPTER else rounded(array, dtype)).astype(wide)
            for name, array in self.arrays.items()
        }


@dataclass(frozen=True, eq=False)
class OptimizerCase:
    """Some steps of an optimizer with given gradients, as NumPy arrays.

    Parameters
    ----------
    name : str
    reason : str
    optimizer : {"adamw", "sgd", "loraplus", "scaled_adamw"}
        AdamW, SGD, AdamW with the learning rate of B multiplied by `ratio`, and AdamW on
        `doraxp.scaled_gradients`.
    numbers : mapping of str to float
        The arguments of each step.
    params : mapping of str to array
        lora_a, lora_b and magnitude before the first step.
    grads : tuple of mappings
        The gradients of each step.
    since : int
        The version of the catalogue that brought the case.
    """

    name: str
    reason: str
    optimizer: str
    numbers: Mapping[str, float]
    params: Mapping[str, Any] = field(repr=False)
    grads: tuple[Mapping[str, Any], ...] = field(repr=False)
    dtypes: tuple[str, ...] = FULL
    since: int = 1


def compute_dtype_name(dtype: str) -> str:
    """Return the name of the dtype in which layers of a storage dtype are computed.

    Raises
    ------
    ValueError
        `dtype` is not one of float16, bfloat16, float32 and float64.
    """
    if dtype not in (*HALF, *FULL):
        raise ValueError(f"dtype must be one of {', '.join((*HALF, *FULL))}, got {dtype!r}")
    return "float32" if dtype in HALF else dtype


def rounded(values: Any, dtype: str) -> Any:
    """Return values rounded to a dtype; those of bfloat16 in float32, as NumPy has no bfloat16."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = values.astype(np.float32).view(np.uint32)
    half_to_even = 0x7FFF + (bits >> 16 & 1)  # bfloat16 is the upper half of float32
    return ((bits + half_to_even) & 0xFFFF0000).astype(np.uint32).view(np.float32)
