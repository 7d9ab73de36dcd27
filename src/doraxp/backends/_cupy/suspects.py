"""Suspect rows: those of V that may lose digits in a product with its factors.

    W (out, in)   A (rank, in)   b = s B (out, rank)   ρ (out,) or None for 1   V = ρ⊙W + b A

Only the device knows which rows are suspect. The kernels form these rows where they need them.
"""

from __future__ import annotations

from typing import NamedTuple

from doraxp._base.types import Namespace
from doraxp.backends._cupy.arrays import DeviceArray, as_stored, packed
from doraxp.backends._direction import Factors


class Suspects(NamedTuple):
    """The suspect rows of V, without rows of zeros, and the factors as the kernels read them."""

    any: DeviceArray
    """Whether there are such rows, (1,) int32."""
    suspect: DeviceArray
    """Their marks, (*stack, out) bool."""
    gained: DeviceArray
    """g⊙b with 0 for the suspect rows, (*stack, out, rank)."""
    factors: Factors


def laid(factors: Factors, xp: Namespace) -> Factors:
    """Return the factors as the kernels read them: W in C order or its transpose in it."""
    weight: DeviceArray = factors.weight
    stored, turned = as_stored(weight, xp)
    rest: list[DeviceArray] = [packed(array, xp) for array in factors[1:]]
    return Factors(weight if turned else stored, *rest)
