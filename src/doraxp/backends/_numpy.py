"""NumPy's overrides: no (out, in) temporary, and low precision by row blocks.

float16 and bfloat16 have no BLAS: a product of them costs 70 times that of float32. So a block of
rows is up-cast into one reused buffer, and the product is made from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from doraxp._base.types import Adapter, Array, Reduce
from doraxp.backends._generic import Factors, Operations

# Elements of a block. What is done to a block in cache is free beside reading it from memory; that
# is 1 MiB in float32. But BLAS's threads spin for some 20 ms after each product and slow what is
# done between two of them, so blocks that are multiplied by many tokens are few: 16 MiB.
CACHE_BLOCK = 1 << 18
PRODUCT_BLOCK = 1 << 22
MERGE_BLOCK = 1 << 20  # between the two: its product has but rank terms


class FormedRows(NamedTuple):
    """The rows of V that the guard formed, in one element of the stack."""

    element: tuple[int, ...]  # which element; () for a plain weight
    rows: Array  # (k,) indices
    values: Array  # (k, in)


def _blocks(array: Array, elements: int) -> Iterator[slice]:
    """Cut the rows of `array` (..., rows, columns) into blocks of about that many elements."""
    rows = array.shape[-2]
    step = max(1, elements * rows // max(1, array.size))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


class NumpyOperations(Operations):
    """What NumPy does better than the standard alone."""

    merges_in_one_pass = True

    def may_look(self, array: Array) -> bool:
        """Always: NumPy's arrays are on the host and eager. Saves 2 µs a call."""
        return True

    def times_transposed(self, x: Array, weight: Array, dtype: Any) -> Array:
        """Saves the whole up-cast copy of a low-precision W."""
        if weight.dtype == dtype:
            return x @ weight.mT
        result = np.empty((*x.shape[:-1], weight.shape[-2]), dtype)
        for rows, wide in _upcast(weight, dtype, _elements(x)):
            result[..., rows] = x @ wide.mT
        return result

    def times(self, d: Array, weight: Array, dtype: Any) -> Array:
        """Saves the whole up-cast copy of a low-precision W."""
        if weight.dtype == dtype:
            return d @ weight
        result = None
        for rows, wide in _upcast(weight, dtype, _elements(d)):
            product = d[..., rows] @ wide
            result = product if result is None else np.add(result, product, out=result)
        return result

    def project(self, weight: Array, a: Array, dtype: Any) -> Array:
        """Saves the whole up-cast copy of a low-precision W."""
        if weight.dtype == dtype:
            return weight @ a.mT
        result = np.empty((*weight.shape[:-1], a.shape[-2]), dtype)
        for rows, wide in _upcast(weight, dtype, PRODUCT_BLOCK):
            result[..., rows, :] = wide @ a.mT
        return result

    def row_squares(self, weight: Array, dtype: Any) -> Array:
        """Saves the (out, in) temporary w², and the time to write and read it."""
        with np.errstate(over="ignore"):  # the guard finds the infinities
            if weight.dtype == dtype and weight.strides[-1] == weight.itemsize:
                # Not einsum: it adds in one chain, and at 4096 numbers loses 5 times the digits.
                return np.vecdot(weight, weight)
            blocks = (np.vecdot(wide, wide) for _, wide in _upcast(weight, dtype, CACHE_BLOCK))
            return np.concatenate(list(blocks), axis=-1)

    def accumulate(self, total: Array, left: Array, right: Array) -> Array:
        """Saves the temporary of the product: blocks of tokens."""
        buffer = None
        for tokens in _blocks(total, CACHE_BLOCK):
            part = total[..., tokens, :]
            if buffer is None:
                buffer = np.empty_like(part)
            product = buffer[..., : part.shape[-2], :]
            part += np.matmul(left[..., tokens, :], right, out=product)
        return total

    def scale_and_shift(
        self, z: Array, row_scale: Array | None, update: tuple[Array, Array] | None,
        gain: Array, bias: Array | None,
    ) -> tuple[Array, Array]:  # fmt: skip
        """Saves the temporary, and reads z from memory once: blocks of tokens."""
        y = np.empty_like(z)
        for tokens in _blocks(z, CACHE_BLOCK):
            part = z[..., tokens, :]
            # What is written to y first is the update, for want of a buffer.
            shifted = y[..., tokens, :]
            if row_scale is not None:
                part *= row_scale[..., None, :]
            if update is not None:
                low_rank, scaled_b = update
                part += np.matmul(low_rank[..., tokens, :], scaled_b.mT, out=shifted)
            np.multiply(gain[..., None, :], part, out=shifted)
            if bias is not None:
                shifted += bias[..., None, :]
        return z, y

    def scale_and_sum(
        self, d: Array, z: Array, gain: Array, room: int, *, total: bool = False
    ) -> tuple[Array, Array, Array | None]:
        """Saves the temporary d⊙z, the copy that appending makes, and reads d from memory once."""
        *stack, tokens, out = d.shape
        rows = np.empty((*stack, tokens + room, out), d.dtype)
        scaled = rows[..., :tokens, :]
        e = np.zeros((*stack, out), d.dtype)
        totals = np.zeros_like(e) if total else None
        for block in _blocks(d, CACHE_BLOCK):
            part = d[..., block, :]
            np.multiply(gain[..., None, :], part, out=scaled[..., block, :])
            e += np.einsum("...to,...to->...o", part, z[..., block, :])
            if totals is not None:
                totals += part.sum(axis=-2)
        return scaled, e, totals

    def append(self, scaled: Array, rows: Array) -> Array:
        """Saves the copy: there is room in the array that `scaled` is the head of."""
        whole: Array = scaled.base
        whole[..., scaled.shape[-2] :, :] = rows
        return whole

    def over_norm(self, values: Array, norm: Array) -> Array:
        """Saves two temporaries and half of the calls."""
        norm = norm.reshape(norm.shape + (1,) * (values.ndim - norm.ndim))
        return np.divide(values, norm, out=np.zeros_like(values), where=norm != 0)

    def merge_with(
        self, factors: Factors, gain_of: Callable[[slice, Array], Array], dtype: Any
    ) -> Array:
        """Saves V and what is made of it: blocks of rows, in the result itself where it is wide."""
        weight, a, scaled_b, row_scale = factors
        result = np.empty(weight.shape, weight.dtype)
        whole, buffer = weight.dtype == dtype, None
        for rows in _blocks(weight, MERGE_BLOCK):
            base, v = weight[..., rows, :], result[..., rows, :]
            if not whole:
                buffer = np.empty(v.shape, dtype) if buffer is None else buffer
                v = buffer[..., : v.shape[-2], :]
            np.matmul(scaled_b[..., rows, :], a, out=v)
            v += base if row_scale is None else row_scale[..., rows, None] * base
            v *= gain_of(rows, v)[..., None]
            if not whole:
                result[..., rows, :] = v
        return result

    def snapshot(self, adapter: Adapter) -> Adapter:
        """Saves 2 µs a call."""
        a, b, m = adapter
        return Adapter(a.copy(), b.copy(), m.copy())

    def _all(self, mask: Array) -> bool:
        """Saves 1 µs a call."""
        return bool(mask.all())

    def guard(
        self, suspect: Array, norm: Array, factors: Factors, dtype: Any,
        reduce: Reduce | None = None,
    ) -> tuple[Array, tuple[FormedRows, ...] | None]:  # fmt: skip
        """Saves V: only the suspect rows are formed, and those of norm 0 not kept."""
        if not suspect.any():
            return norm, None
        norm = norm.copy()
        formed = []
        for element in np.ndindex(suspect.shape[:-1]):
            rows = np.flatnonzero(suspect[element])
            if rows.size == 0:
                continue
            values = self.form(_pick(factors, element, rows), dtype)
            norms = self.safe_row_norms(values, reduce)
            norm[element][rows] = norms
            # A zero row has gain 0: whatever the factored formulas give for it is not used.
            kept = norms != 0
            if kept.any():
                formed.append(FormedRows(element, rows[kept], values[kept]))
        return norm, tuple(formed) or None

    def guarded_times_transposed(
        self, formed: tuple[FormedRows, ...], x: Array, factored: Callable[[Array], Array]
    ) -> Array:
        """Replace the formed columns of the factored x Vᵀ."""
        result = factored(x)
        for element, rows, values in formed:
            result[element][..., rows] = x[element] @ values.T
        return result

    def guarded_times(
        self, formed: tuple[FormedRows, ...], d: Array, low: Array,
        factored: Callable[[Array], Array], rounded: int,
    ) -> Array:  # fmt: skip
        """Keep the formed columns of d out of the factored d V, and add their part."""
        parts = [d[element][..., rows] @ values for element, rows, values in formed]
        for element, rows, _ in formed:
            d[element][..., rows] = 0
        result = factored(d)
        for (element, _, _), part in zip(formed, parts, strict=True):
            result[element][...] += part
        return result


def _pick(factors: Factors, element: tuple[int, ...], rows: Array) -> Factors:
    """Return the factors of some rows of one element of the stack."""
    weight, a, scaled_b, row_scale = factors
    return Factors(
        weight[element][rows],
        None if a is None else a[element],
        None if scaled_b is None else scaled_b[element][rows],
        None if row_scale is None else row_scale[element][rows],
    )


def _elements(tokens: Array) -> int:
    """Return the size of the blocks of W: BLAS has no threads for one token, so none that spin."""
    return CACHE_BLOCK if tokens.shape[-2] == 1 else PRODUCT_BLOCK


def _upcast(weight: Array, dtype: Any, elements: int) -> Iterator[tuple[slice, Array]]:
    """Yield each block of rows of `weight` in `dtype`, in one buffer: use it before the next."""
    buffer = None
    for rows in _blocks(weight, elements):
        block = weight[..., rows, :]
        if buffer is None:
            buffer = np.empty(block.shape, dtype)
        wide = buffer[..., : block.shape[-2], :]
        wide[...] = block
        yield rows, wide
