"""Masks of dropout, drawn on the host.

p  rate        mask  0 with probability p, else 1/(1 − p)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from doraxp._base.scalars import check_count, check_number
from doraxp._base.types import Array
from doraxp.backends import as_dtype, compute_dtype, operations


class Dropout:
    """A rate, and the generator of the masks. All backends get the same masks."""

    def __init__(self, rate: float, seed: int) -> None:
        self.rate = check_number("dropout", rate, below=1)
        # Another stream than that of `init`, which the seed itself starts.
        sequence = np.random.SeedSequence(check_count("seed", seed), spawn_key=(1,))
        self.generator = np.random.Generator(np.random.PCG64(sequence))

    def mask_of(self, x: Array) -> Array:
        """Return the next mask, in the shape, dtype, library and device of x."""
        ops = operations(x=x)
        xp = ops.xp
        kept = self.generator.random(tuple(x.shape), dtype=np.float32) >= self.rate
        wide = np.float64 if compute_dtype(x, xp=xp) == xp.float64 else np.float32
        mask = np.where(kept, wide(1 / (1 - self.rate)), wide(0))
        return as_dtype(xp.asarray(mask, device=ops.device(x)), x.dtype, xp=xp)

    def check(self, state: dict[str, Any]) -> None:
        """Raise unless the generator takes a state."""
        bits: np.random.BitGenerator = np.random.PCG64()
        bits.state = state

    @property
    def state(self) -> dict[str, Any]:
        """The state of the generator: values of JSON."""
        return dict(self.generator.bit_generator.state)

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self.generator.bit_generator.state = state
