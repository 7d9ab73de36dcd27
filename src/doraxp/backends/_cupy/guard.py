"""The norm on NVIDIA GPUs, and the guard: rows that factored formulas cannot serve use V itself.

Only the device knows which rows are suspect. The guard launches its kernels in any case: they form
a suspect row wherever they need it, and end at once if there are no such rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from doraxp._base.types import Namespace
from doraxp.backends._cupy.arrays import (
    LOW,
    DeviceArray,
    FactorsT,
    PlainWeight,
    as_stored,
    dtype_name,
    name_of,
    one_type,
    packed,
)
from doraxp.backends._cupy.device import Cuda
from doraxp.backends._cupy.products import Products
from doraxp.backends._cupy.signatures import (
    Assemble,
    GuardNorms,
    ListSuspects,
    Norms,
)
from doraxp.backends._cupy.source import THREADS, WARPS, Types, blocks
from doraxp.backends._direction import Factors

GUARDS = 64
"""Blocks over the listed rows. There are few such rows, or there are no such rows."""
MEASURERS = 1024
"""The most blocks that look for suspect rows and measure them."""
LISTERS = 1024
"""Threads that list the suspect rows. kernels/guard.cu has the same."""
TILE = 8
"""Tokens that a thread works on at once. kernels/guard.cu has the same."""
TILES = 16
"""The most blocks over tokens in `outputs`: blocks without work take time too."""
BLOCKS = 2048
"""About how many blocks `product` launches to add the listed rows."""
ROUNDED = 2
"""Parts of a factor whose product is rounded to 8 bits: they hold 16."""


class Suspects(NamedTuple):
    """The suspect rows of V, without rows of zeros, and the factors as the kernels read them."""

    any: DeviceArray
    """Whether there are such rows, (1,) int32."""
    suspect: DeviceArray
    """Their marks, (*stack, out) bool."""
    gained: DeviceArray
    """g⊙b with 0 for the suspect rows, (*stack, out, rank)."""
    factors: Factors


class Guard:
    """The norm, and the products with V, including the rows whose factored form lost digits."""

    def __init__(self, xp: Namespace, cuda: Cuda, products: Products) -> None:
        self.xp, self.cuda, self.products = xp, cuda, products

    # The norm

    def adapted_norm(
        self, u: DeviceArray, gram: DeviceArray, squares: DeviceArray, factors: Factors,
        magnitude: DeviceArray, floor: float, cancellation: float,
    ) -> tuple[DeviceArray, DeviceArray, DeviceArray, Suspects]:  # fmt: skip
        """Return n, g = m / n, V Aᵀ / n and the suspect rows, by four launches.

        The launches are a product, the norm, the norms of the suspect rows, and their list.
        """
        factors, magnitude, kind = self.laid(factors), packed(magnitude, self.xp), u.dtype
        norm, gain = (self.cuda.empty(squares.shape, kind) for _ in range(2))
        suspect = self.cuda.empty(squares.shape, self.xp.bool)
        unit = self.cuda.empty(u.shape, kind)
        *_, out, rank = u.shape
        whole = name_of(factors.weight) in LOW
        bg = self.products.multiply(factors.scaled_b, gram, kind, whole=whole)
        u, b, bg, squares, row_scale, gram = (
            packed(array, self.xp)
            for array in (u, factors.scaled_b, bg, squares, factors.row_scale, gram)
        )
        arguments = Assemble(
            u=u, b=b, bg=bg, squares=squares, row_scale=row_scale, gram=gram, magnitude=magnitude,
            norm=norm, gain=gain, unit=unit, suspect=suspect, rows=squares.size, out=out,
            rank=rank, floor=floor, cancellation=cancellation,
        )  # fmt: skip
        self.cuda.launch(arguments, one_type(u), (blocks(squares.size, WARPS), 1, 1))
        self.measure(suspect, norm, factors, magnitude=magnitude, gain=gain, unit=unit)
        return norm, gain, unit, self.listed(suspect, norm, gain, factors)

    def norms(self, squares: DeviceArray, factors: FactorsT, floor: float) -> DeviceArray:
        """Return ‖Vᵢ‖ from ‖Vᵢ‖², by two launches. The guard makes no list of its rows here."""
        kind = squares.dtype
        norm, suspect = (self.cuda.empty(squares.shape, dtype) for dtype in (kind, self.xp.bool))
        arguments = Norms(
            squares=squares, norm=norm, suspect=suspect, rows=squares.size, floor=floor
        )
        self.cuda.launch(arguments, one_type(squares), (blocks(squares.size, THREADS), 1, 1))
        self.measure(suspect, norm, self.laid(factors))
        return norm

    # The suspect rows

    def laid(self, factors: FactorsT) -> FactorsT:
        """Return the factors as the kernels read them: W in C order or its transpose in it."""
        weight: DeviceArray = factors.weight
        stored, turned = as_stored(weight, self.xp)
        rest: list[DeviceArray] = [packed(array, self.xp) for array in factors[1:]]
        return type(factors)(weight if turned else stored, *rest)

    def measure(
        self, suspect: DeviceArray, norm: DeviceArray, factors: Factors | PlainWeight, *,
        magnitude: DeviceArray | None = None, gain: DeviceArray | None = None,
        unit: DeviceArray | None = None,
    ) -> None:  # fmt: skip
        """Write n of the suspect rows into `norm`; with `gain`, also g = m / n and V Aᵀ / n."""
        kind = dtype_name(norm.dtype)
        arguments = GuardNorms(
            suspect=suspect, rows=norm.size, norm=norm, magnitude=magnitude, gain=gain, unit=unit,
            **_of(factors),
        )  # fmt: skip
        types = Types(name_of(factors.weight), kind, kind)
        self.cuda.launch(arguments, types, (min(norm.size, MEASURERS), 1, 1))

    def listed(
        self, suspect: DeviceArray, norm: DeviceArray, gain: DeviceArray, factors: Factors
    ) -> Suspects:
        """Return the suspect rows that are not of zeros, and unmark those that are."""
        rows = self.cuda.empty((norm.size,), np.int32)
        count, switches = self.cuda.empty((1,), np.int32), self.cuda.empty((2,), norm.dtype)
        arguments = ListSuspects(
            suspect=suspect, norm=norm, listed=rows, listed_count=count, switches=switches,
            rows=norm.size,
        )  # fmt: skip
        self.cuda.launch(arguments, one_type(norm), (1, 1, 1), threads=LISTERS)
        gained = self.xp.where(suspect, 0, gain)[..., None] * factors.scaled_b
        return Suspects(count, suspect, gained.astype(gain.dtype), factors)


def _of(factors: Factors | PlainWeight) -> dict[str, Any]:
    """Return the arguments for V, which four kernels of the guard have in common."""
    weight: DeviceArray = factors.weight
    _, a, scaled_b, row_scale = factors
    *_, out, inner = weight.shape
    return {
        "weight": weight, "turned": not weight.flags.c_contiguous, "a": a, "b": scaled_b,
        "row_scale": row_scale, "out": out, "inner": inner,
        "rank": 0 if a is None else a.shape[-2],
    }  # fmt: skip
