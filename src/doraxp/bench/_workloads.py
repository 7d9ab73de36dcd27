"""A workload: one layer, its adapter, how many tokens it is given, and where."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from doraxp._base.extras import require
from doraxp._base.types import Adapter, Array, Config, DType, HostArray

TASKS = ("forward", "backward", "step", "evaluation", "norm", "merge", "adamw")
DTYPES = ("float32", "float64", "float16", "bfloat16")
LEARNING_RATE = 1e-3
IN_PRODUCTS = ("forward", "backward", "step")
"""Tasks in which numbers between two products may be rounded to a 16-bit dtype."""
AUTOCAST = "bfloat16"
"""The dtype of PyTorch's autocast."""
UNITS = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
"""The unit roundoff: the largest relative error of one rounding."""
ROUNDINGS = 10
"""Unit roundoffs to allow, relative to the largest value, where numbers are rounded on the way to
an answer. At most four are: z, y, g⊙dy and dx, or both factors of two products. Independent errors
of a sum's terms add up as the terms do, to the same part of the sum; and the largest of a million
normal numbers is 5 times the usual one, as is the value that it is compared with."""


@dataclass(frozen=True)
class Workload:
    """The sizes of a layer, the number of tokens, the rank, and the dtype of the weight.

    autocast    PyTorch's autocast is on
    device      where PyTorch computes: cpu or cuda
    """

    out: int
    inner: int
    tokens: int
    rank: int
    dtype: str = "float32"
    autocast: bool = False
    device: str = "cpu"

    def __str__(self) -> str:
        tokens = f"{self.tokens} token{'s' if self.tokens > 1 else ''}"
        autocast = f" under {AUTOCAST} autocast" if self.autocast else ""
        return f"{self.out}×{self.inner} {self.dtype}{autocast}, rank {self.rank}, {tokens}"

    @property
    def config(self) -> Config:
        """The config of the adapter."""
        return Config(self.rank)

    @property
    def roundings(self) -> float | None:
        """The error to allow where numbers are rounded to 16 bits; None if they are not."""
        unit = UNITS.get(AUTOCAST if self.autocast else self.dtype)
        return None if unit is None else ROUNDINGS * unit


class Inputs(NamedTuple):
    """The arrays of a workload; all except the weight are in the compute dtype."""

    weight: Array
    adapter: Adapter
    x: Array
    dy: Array


@functools.lru_cache(maxsize=1)
def draw(workload: Workload) -> Inputs:
    """Draw a layer after some training: ‖s B A‖ is about ‖W‖ / 4, and m is near the norms."""
    rng = np.random.default_rng(0)
    wide = np.float64 if workload.dtype == "float64" else np.float32

    def normal(*shape: int, scale: float = 1.0) -> HostArray:
        array = rng.standard_normal(shape, wide)
        array *= scale
        return array

    weight = normal(workload.out, workload.inner, scale=workload.inner**-0.5)
    lora_a = normal(workload.rank, workload.inner, scale=(3 * workload.inner) ** -0.5)
    lora_b = normal(workload.out, workload.rank, scale=0.4 * workload.rank**-0.5)
    magnitude = np.sqrt(np.vecdot(weight, weight)) * (1 + normal(workload.out, scale=0.1))
    return Inputs(
        weight.astype(numpy_dtype(workload.dtype), copy=False),
        Adapter(lora_a, lora_b, magnitude),
        normal(workload.tokens, workload.inner),
        normal(workload.tokens, workload.out),
    )


@functools.lru_cache(maxsize=1)
def stored(workload: Workload) -> Inputs:
    """Return the inputs with x and dy in the weight's dtype."""
    weight, adapter, *others = draw(workload)
    arrays: Any = others  # NumPy's, as all of `draw`
    return Inputs(weight, adapter, *(array.astype(weight.dtype, copy=False) for array in arrays))


def numpy_dtype(name: str) -> DType:
    """Return NumPy's dtype for a name in `DTYPES`; bfloat16 comes from ml_dtypes."""
    if name == "bfloat16":
        require("bench", "ml_dtypes", of="bfloat16")
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)
