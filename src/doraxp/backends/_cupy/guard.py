"""The norm on NVIDIA GPUs, and the guard: rows that factored formulas cannot serve use V itself.

Only the device knows which rows are suspect. The guard launches its kernels in any case: they form
a suspect row wherever they need it, and end at once if there are no such rows.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from doraxp._base.types import Namespace
from doraxp.backends._cupy.arrays import (
    DeviceArray,
    FactorsT,
    PlainWeight,
    as_stored,
    dtype_name,
    name_of,
    one_type,
    packed,
    types_of,
)
from doraxp.backends._cupy.device import Cuda
from doraxp.backends._cupy.products import FEW, PARTS, Products
from doraxp.backends._cupy.signatures import (
    Assemble,
    GuardHide,
    GuardInputs,
    GuardLow,
    GuardNorms,
    GuardOutputs,
    ListSuspects,
    Norms,
)
from doraxp.backends._cupy.source import LIMIT, THREADS, WARPS, Types, blocks
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
    """The suspect rows of V, without rows of zeros. The guard's kernels form them when needed."""

    rows: DeviceArray  # (stack · out,) int32; the first `count` are indices of rows
    count: DeviceArray  # (1,) int32
    switches: DeviceArray  # (2,): 1, and 1 where count > 0, else 0
    suspect: DeviceArray  # (*stack, out): the same rows, marked
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
        bg = self.products.product(factors.scaled_b, gram)
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
        return norm, gain, unit, self.listed(suspect, norm, factors)

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

    def listed(self, suspect: DeviceArray, norm: DeviceArray, factors: Factors) -> Suspects:
        """Return the suspect rows that are not of zeros, and unmark those that are."""
        rows = self.cuda.empty((norm.size,), np.int32)
        count, switches = self.cuda.empty((1,), np.int32), self.cuda.empty((2,), norm.dtype)
        arguments = ListSuspects(
            suspect=suspect, norm=norm, listed=rows, listed_count=count, switches=switches,
            rows=norm.size,
        )  # fmt: skip
        self.cuda.launch(arguments, one_type(norm), (1, 1, 1), threads=LISTERS)
        return Suspects(rows, count, switches, suspect, factors)

    # Products with V

    def outputs(
        self, found: Suspects, x: DeviceArray, z: DeviceArray, *, y: DeviceArray | None = None,
        gain: DeviceArray | None = None, bias: DeviceArray | None = None,
    ) -> None:  # fmt: skip
        """Write the columns of z = x Vᵀ, and of y = g⊙z + bias, that belong to listed rows."""
        x = packed(x, self.xp)
        tokens = x.shape[-2]
        if tokens == 0:
            return
        step, along = (stride // z.itemsize for stride in z.strides[-2:])
        arguments = GuardOutputs(
            listed=found.rows, listed_count=found.count, x=x,
            x_is_stored=x.dtype == found.factors.weight.dtype,
            z=z, z_element=z.shape[-2] * z.shape[-1], z_token=step, z_row=along,
            y=y, gain=packed(gain, self.xp), bias=packed(bias, self.xp), tokens=tokens,
            **_of(found.factors),
        )  # fmt: skip
        grid = GUARDS, min(blocks(tokens, TILE), TILES), 1
        self.cuda.launch(arguments, types_of(found.factors.weight, z, found.switches), grid)

    def product(
        self, found: Suspects, d: DeviceArray, d_b: DeviceArray, rounded: int
    ) -> DeviceArray:
        """Return d V. Overwrites `d`, and `d_b` = d (s B).

        The caller will round the first `rounded` rows of the result to the dtype of W.
        """
        xp, multiply = self.xp, self.products.multiply
        weight, a, _, row_scale = found.factors
        d, d_b = packed(d, xp), packed(d_b, xp)
        result = self.cuda.empty((*d.shape[:-1], weight.shape[-1]), d.dtype)
        if d.shape[-2] == 0:
            return result
        self._move_suspects(found, d, d_b, result)
        multiply(d_b, a, d.dtype, out=result, beta=found.switches)
        if row_scale is not None:
            d = xp.astype(row_scale[..., None, :] * d, d.dtype, copy=False)
        if rounded <= FEW or name_of(d) != "float32" or name_of(weight) != "bfloat16":
            return multiply(d, weight, d.dtype, out=result, beta=1.0)
        for rows, parts in (slice(rounded), ROUNDED), (slice(rounded, None), PARTS):
            part = result[..., rows, :]
            multiply(d[..., rows, :], weight, d.dtype, out=part, beta=1.0, parts=parts)
        return result

    def _move_suspects(
        self, found: Suspects, d: DeviceArray, d_b: DeviceArray, result: DeviceArray
    ) -> None:
        """Put the listed rows' part of d V into `result`, and take them out of d and d_b."""
        *stack, tokens, out = d.shape
        inner, elements = result.shape[-1], math.prod(stack)
        types = types_of(found.factors.weight, d, found.switches)
        across = blocks(inner, THREADS)
        few = min(blocks(tokens, TILE), max(1, BLOCKS // (across * elements)))
        inputs = GuardInputs(
            listed=found.rows, listed_count=found.count, d=d, result=result, tokens=tokens,
            **_of(found.factors),
        )  # fmt: skip
        self.cuda.launch(inputs, types, (across, few, elements))
        hide = GuardHide(listed=found.rows, listed_count=found.count, d=d, tokens=tokens, out=out)
        self.cuda.launch(hide, types, (blocks(tokens, THREADS), GUARDS, 1))
        again = GuardLow(
            listed_count=found.count, d=d, b=found.factors.scaled_b, low=d_b, tokens=tokens,
            out=out, rank=d_b.shape[-1],
        )  # fmt: skip
        self.cuda.launch(again, types, (min(blocks(tokens, WARPS), LIMIT), elements, 1))


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
