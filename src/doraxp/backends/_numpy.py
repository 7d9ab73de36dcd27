"""NumPy's overrides: no temporary (out, in), and narrow weights by blocks of rows.

    W (out, in)   A (rank, in)   B (out, rank)   ρ (out,) or None for 1   V = ρ⊙W + s B A

BLAS has no products of float16 or bfloat16 arrays, and NumPy's own take 70 times as long as those
of float32. So one block of rows after another is cast into the same buffer, and multiplied there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from doraxp._base.types import (
    AdamWLeaves,
    AdamWNumbers,
    AdamWStepped,
    Adapter,
    DType,
    Reduce,
    RowWeight,
    Snapshot,
)
from doraxp.backends._direction import (
    Arithmetic,
    Direction,
    Factored,
    Factors,
    ProductDirection,
    form,
    see_dropped,
    split_rows,
)
from doraxp.backends._dtypes import transpose
from doraxp.backends._generic import (
    CHAIN,
    Norm,
    Operations,
    OutputGradients,
    in_range,
    safe_row_norms,
    same_values,
    token_sums,
)
from doraxp.backends._numpy_adamw import adamw
from doraxp.backends._numpy_layers import NumpyLayerOperations
from doraxp.backends._packed import Packed, row_groups, spread

# Elements of a block. A block of 1 MiB in float32 stays in cache, where work on it costs little
# beside reading it from memory. But the threads of BLAS spin for some 20 ms after each product, and
# slow the work between two products: so a block that many tokens are multiplied by has 16 MiB.
CACHE_BLOCK = 1 << 18
PRODUCT_BLOCK = 1 << 22
MANY_TERMS = 512  # the longest sum of products that is made by blocks of tokens
MERGE_BLOCK = 1 << 20  # between the two: its product has only `rank` terms

NumpyArray: TypeAlias = Any
"""An `np.ndarray`. mypy refuses that class as the type of an argument here, because the methods
override those of `Operations` and `Direction`, which take any `Array`."""
ConsumedArray: TypeAlias = NumpyArray
"""A `NumpyArray` that the function may write to: its caller must not read it again."""


class Patch(NamedTuple):
    """The stored rows of V in one element of the stack."""

    element: tuple[int, ...]
    """The element of the stack; () for a plain weight."""
    rows: NumpyArray
    """Indices of the rows, (k,)."""
    values: NumpyArray
    """These rows of V, (k, in)."""


class Patched(NamedTuple):
    """V given by its factors, and a few rows of V that are stored."""

    factors: Factors
    patches: tuple[Patch, ...]

    def transposed_product(
        self, x: NumpyArray, low: NumpyArray, base: ConsumedArray | None = None,
        dropped: NumpyArray | None = None,
        *, ops: Arithmetic,
    ) -> NumpyArray:  # fmt: skip
        """Multiply by the factors, then replace the columns that belong to stored rows of V."""
        if dropped is not None:
            low = ops.product(x, transpose(self.factors.lora_a))
        z: NumpyArray = Factored(self.factors).transposed_product(x, low, base, ops=ops)
        for element, rows, values in self.patches:
            z[element][..., rows] = x[element] @ values.T
        return see_dropped(z, x, dropped, self.factors, ops=ops)

    def outputs(
        self, x: NumpyArray, low: NumpyArray, gain: NumpyArray, bias: NumpyArray | None,
        base: ConsumedArray | None = None, dropped: NumpyArray | None = None, *, ops: Arithmetic,
    ) -> tuple[NumpyArray, NumpyArray]:  # fmt: skip
        """Return z and y = g⊙z + bias."""
        z = self.transposed_product(x, low, base, dropped, ops=ops)
        return ops.forward_epilogue(z, None, None, gain, bias)

    def product(
        self, d: ConsumedArray, d_b: ConsumedArray, tokens: int, dtype: DType,
        *, round_later: bool = False, ops: Arithmetic,
    ) -> tuple[NumpyArray, NumpyArray]:  # fmt: skip
        """Multiply the columns of d that belong to stored rows by these, the others by factors."""
        parts = [d[element][..., rows] @ values for element, rows, values in self.patches]
        for element, rows, _ in self.patches:
            d[element][..., rows] = 0
        d_b = ops.product(d, self.factors.scaled_b)  # without the columns that are now 0
        count = d.shape[-2]
        result: NumpyArray
        result, _ = Factored(self.factors).product(d, d_b, count, d.dtype, ops=ops)
        for (element, _, _), part in zip(self.patches, parts, strict=True):
            result[element][...] += part
        return split_rows(result, tokens, None if round_later else dtype, ops=ops)

    def projection(self, factored: NumpyArray, *, ops: Arithmetic) -> NumpyArray:
        """Return `factored`, with the rows that are stored multiplied by Aᵀ anew."""
        projection, a = factored.copy(), transpose(self.factors.lora_a)
        for element, rows, values in self.patches:
            projection[element][rows] = values @ a[element]
        return projection

    def dense(self, *, ops: Arithmetic) -> NumpyArray:
        """Return V, formed from its factors: a sum that is formed does not cancel further."""
        return form(self.factors, self.factors.lora_a.dtype, xp=ops.xp)

    def with_weight(self, weight: NumpyArray) -> Patched:
        """Return the direction with another object for W."""
        return Patched(self.factors._replace(weight=weight), self.patches)


class NumpyOperations(NumpyLayerOperations, Operations):
    """The operations on NumPy's arrays."""

    def can_read_values(self, array: NumpyArray) -> bool:
        """Return True: NumPy's arrays are on the host and eager. Saves 2 µs a call."""
        return True

    # Products

    def product(self, left: NumpyArray, right: NumpyArray) -> NumpyArray:
        """Return left right. Saves a copy of the whole weight in the compute dtype."""
        if left.dtype == right.dtype:
            return left @ right
        if left.itemsize < right.itemsize:
            return _narrow_left(left, right)
        if right.strides[-1] > right.strides[-2]:  # x Wᵀ: the columns of Wᵀ are rows of W
            return _narrow_transposed(left, right.mT)
        return _narrow_right(left, right)

    def accumulate(self, total: ConsumedArray, left: NumpyArray, right: NumpyArray) -> NumpyArray:
        """Return total + left right, in `total`, by blocks of tokens. Saves the product's array.

        A `right` of many rows is multiplied at once: BLAS would copy it for each block of tokens.
        """
        if total.size <= CACHE_BLOCK or right.shape[-2] > MANY_TERMS:
            total += left @ right
            return total
        buffer = None
        for tokens in _blocks(total, CACHE_BLOCK):
            part = total[..., tokens, :]
            if buffer is None:
                buffer = np.empty_like(part)
            product = buffer[..., : part.shape[-2], :]
            part += np.matmul(left[..., tokens, :], right, out=product)
        return total

    # Weights that are given by rows

    def block_size(self, weight: RowWeight, tokens: int) -> int:
        """Return the size of a block of W."""
        return CACHE_BLOCK if tokens == 1 else PRODUCT_BLOCK

    def unpacked(
        self, packed: Packed, rows: slice, buffer: ConsumedArray | None = None
    ) -> NumpyArray:
        """Return some rows of a packed weight, in `buffer`, by blocks that stay in cache.

        NumPy makes indices of 8 bytes from the codes, and a product needs an array of the scales:
        the blocks keep both small.
        """
        inner, count = packed.shape[1], rows.stop - rows.start
        if buffer is None:
            buffer = np.empty((count, inner), packed.dtype)
        result, step = buffer[:count], max(1, CACHE_BLOCK // inner)
        wide = None if packed.dtype == np.float32 else np.empty((min(step, count), inner), "f4")
        for first in range(0, count, step):
            here = slice(first, min(first + step, count))
            of_weight = slice(rows.start + here.start, rows.start + here.stop)
            part = result[here] if wide is None else wide[: here.stop - here.start]
            _unpack(packed, of_weight, part)
            if wide is not None:
                result[here] = part
        return result

    # Before and after the products with V

    def forward_epilogue(
        self, z: ConsumedArray, row_scale: NumpyArray | None,
        update: tuple[NumpyArray, NumpyArray] | None, gain: NumpyArray, bias: NumpyArray | None,
    ) -> tuple[NumpyArray, NumpyArray]:  # fmt: skip
        """Return z and y, by blocks of tokens. Saves L (s B)ᵀ, and reads z from memory once."""
        y = np.empty(z.shape, z.dtype)
        for tokens in _blocks(z, CACHE_BLOCK):
            part = z[..., tokens, :]
            shifted = y[..., tokens, :]  # the buffer of the update first, and then y
            if row_scale is not None:
                part *= row_scale[..., None, :]
            if update is not None:
                low, scaled_b = update
                part += np.matmul(low[..., tokens, :], scaled_b.mT, out=shifted)
            np.multiply(gain[..., None, :], part, out=shifted)
            if bias is not None:
                shifted += bias[..., None, :]
        return z, y

    def output_gradients(
        self, d: NumpyArray, z: NumpyArray, gain: NumpyArray, norm: NumpyArray,
        scaled_b: NumpyArray,
        *, exact: bool, with_bias: bool,
    ) -> OutputGradients:  # fmt: skip
        """Return the gradients, by blocks of tokens. One array holds dz and the rows below it.

        Saves the temporary dy⊙z and the copy that `concat` makes, and reads dy once.
        """
        *stack, tokens, out = d.shape
        rank = scaled_b.shape[-1] if exact else 0
        rows = np.empty((*stack, tokens + rank, out), d.dtype)
        blocks = [*_blocks(d, CACHE_BLOCK)]
        e = np.empty((*stack, len(blocks), out), d.dtype)  # the sum over each block
        dbias = np.empty_like(e) if with_bias else None
        for number, block in enumerate(blocks):
            part = d[..., block, :]
            np.multiply(gain[..., None, :], part, out=rows[..., block, :])
            e[..., number, :] = _sums_of_products(part, z[..., block, :])
            if dbias is not None:
                dbias[..., number, :] = self.token_sums(part)
        dm, p = self.over_norm(_total(e), norm), None
        dbias = None if dbias is None else _total(dbias)
        if exact:
            p = gain * dm
            below = self.over_norm(-p[..., None] * scaled_b, norm)  # (out, rank)
            rows[..., tokens:, :] = below.mT
        return OutputGradients(rows, rows @ scaled_b, dm, p, dbias)

    def over_norm(self, values: NumpyArray, norm: NumpyArray) -> NumpyArray:
        """Return values / n, 0 where n = 0. Saves two temporaries."""
        norm = norm.reshape(norm.shape + (1,) * (values.ndim - norm.ndim))
        return np.divide(values, norm, out=np.zeros(values.shape, values.dtype), where=norm != 0)

    # The norm

    def row_squares(self, weight: NumpyArray, dtype: DType) -> NumpyArray:
        """Return ‖wᵢ‖² by rows. Saves w², an array (out, in), and the time to write and read it."""
        with np.errstate(over="ignore"):  # the guard measures rows of infinite sums again
            if weight.dtype == dtype and weight.strides[-1] == weight.itemsize:
                # Not einsum: it adds in one chain, and its error at 4096 numbers is 5 times larger.
                return np.vecdot(weight, weight)
            blocks = (np.vecdot(wide, wide) for _, wide in _upcast(weight, dtype, CACHE_BLOCK))
            return np.concatenate(list(blocks), axis=-1)

    def row_norms(
        self, weight: NumpyArray, squares: NumpyArray, reduce: Reduce | None = None
    ) -> NumpyArray:
        """Return ‖wᵢ‖. Measure only the rows whose squares left the range of the dtype."""
        trusted: NumpyArray = in_range(squares, weight.shape[-1], xp=self.xp)
        norm = np.sqrt(squares)
        if not trusted.all():
            for element, rows in _indices(~trusted):
                values = weight[element][rows].astype(norm.dtype)
                norm[element][rows] = safe_row_norms(values, reduce, xp=self.xp)
        return norm

    def _guarded_norm(
        self, norm: ConsumedArray, projection: NumpyArray, trusted: NumpyArray, factors: Factors,
        magnitude: NumpyArray, reduce: Reduce | None,
    ) -> Norm:  # fmt: skip
        """Return n, g, V Aᵀ / n and V. If all rows are trusted, n > 0: saves the masks of n = 0."""
        if trusted.all():
            return Norm(norm, magnitude / norm, projection / norm[..., None], Factored(factors))
        return super()._guarded_norm(norm, projection, trusted, factors, magnitude, reduce)

    def _measure_on_v(
        self, trusted: NumpyArray, norm: ConsumedArray, factors: Factors, reduce: Reduce | None
    ) -> tuple[NumpyArray, ProductDirection]:
        """Compute only the rows of V that are not trusted, and store those whose norm is not 0."""
        patches = []
        for element, rows in _indices(~trusted):
            values = form(_pick(factors, element, rows), norm.dtype, xp=self.xp)
            norms: NumpyArray = safe_row_norms(values, reduce, xp=self.xp)
            norm[element][rows] = norms
            # A zero row has gain 0: the factored results for it are multiplied by 0.
            stored = norms != 0
            if stored.any():
                patches.append(Patch(element, rows[stored], values[stored]))
        return norm, Patched(factors, tuple(patches)) if patches else Factored(factors)

    # Merging

    def merge(self, direction: Direction, gain: NumpyArray) -> NumpyArray:
        """Return W' = g⊙V by blocks of rows. Saves V and g⊙V, arrays (out, in).

        Each block of V is formed anew, so stored rows are not read.
        """
        result, blocks = _merged_blocks(direction.factors, gain.dtype)
        for rows, v in blocks:
            v *= gain[..., rows, None]
        return result

    def merge_and_measure(self, factors: Factors, magnitude: NumpyArray) -> NumpyArray:
        """Return W' = (m / n)⊙V by blocks of rows: V is in the cache when n is measured on it."""
        result, blocks = _merged_blocks(factors, magnitude.dtype)
        for rows, v in blocks:
            norm = self.row_norms(v, self.row_squares(v, v.dtype))
            v *= self.over_norm(magnitude[..., rows], norm)[..., None]
        return result

    # Optimizers

    def adamw(
        self, leaves: AdamWLeaves, rates: Sequence[float | NumpyArray],
        decays: Sequence[float | NumpyArray], numbers: AdamWNumbers, *, donate: bool,
    ) -> AdamWStepped:  # fmt: skip
        """Return p, mu and nu by blocks. Saves 16 temporary arrays, and reads each array once.

        With `donate` they are the given arrays, where these can be written to.
        """
        return adamw(leaves, rates, decays, numbers, donate=donate)

    # A prepared norm must not be used with another adapter

    def snapshot(self, adapter: Adapter) -> list[bytes]:
        """Return the bytes of A, B and m."""
        leaves: tuple[NumpyArray, ...] = adapter
        a, b, m = leaves
        return [a.tobytes(), b.tobytes(), m.tobytes()]

    def unchanged(self, snapshot: Snapshot | None, then: Adapter, now: Adapter) -> bool:
        """Return whether the values are the same: those of arrays whose bytes differ are compared.

        The bytes of 0 and −0 differ, for one. Saves half of the time of comparing all values.
        """
        if not isinstance(snapshot, list):  # made by another library's operations
            return super().unchanged(snapshot, then, now)
        new: NumpyArray
        for stored, old, new in zip(snapshot, then, now, strict=True):
            if old.shape != new.shape or old.dtype != new.dtype:
                return False
            # `startswith` compares with the array's own memory: it saves a copy of it.
            whole = stored.startswith(new) if new.flags.c_contiguous else stored == new.tobytes()
            if not whole:
                before = np.frombuffer(stored, old.dtype).reshape(old.shape)
                if not same_values(before, new, xp=self.xp):
                    return False
        return True


def _blocks(array: NumpyArray, elements: int) -> Iterator[slice]:
    """Return slices of the rows of `array` (..., rows, columns): about `elements` numbers each."""
    rows, size = array.shape[-2], array.size
    step = rows if size <= elements else max(1, elements * rows // size)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step or 1))


def _sums_of_products(left: NumpyArray, right: NumpyArray) -> NumpyArray:
    """Return the sums of left⊙right over the tokens, in the order of `token_sums`.

    Saves the array of the products.
    """
    *stack, tokens, out = left.shape
    if tokens <= CHAIN:
        return np.einsum("...to,...to->...o", left, right)
    rest = tokens % CHAIN
    chains = [array[..., rest:, :].reshape(*stack, -1, CHAIN, out) for array in (left, right)]
    total = token_sums(np.einsum("...to,...to->...o", *chains), xp=np)
    if rest:
        total += np.einsum("...to,...to->...o", left[..., :rest, :], right[..., :rest, :])
    return total


def _total(sums: NumpyArray) -> NumpyArray:
    """Return the sum of the sums over blocks of tokens, (*stack, blocks, out) -> (*stack, out)."""
    if sums.shape[-2] == 1:  # saves 3 µs
        return sums[..., 0, :]
    return token_sums(sums, xp=np)


def _indices(mask: NumpyArray) -> Iterator[tuple[tuple[int, ...], NumpyArray]]:
    """Yield each element of the stack in which `mask` (*stack, out) is true, and its rows there."""
    for element in np.ndindex(mask.shape[:-1]):
        rows = np.flatnonzero(mask[element])
        if rows.size:
            yield element, rows


def _upcast(weight: NumpyArray, dtype: DType, elements: int) -> Iterator[tuple[slice, NumpyArray]]:
    """Yield blocks of rows of `weight` in `dtype`. Each overwrites the one before it."""
    buffer = None
    for rows in _blocks(weight, elements):
        block = weight[..., rows, :]
        if buffer is None:
            buffer = np.empty(block.shape, dtype)
        wide = buffer[..., : block.shape[-2], :]
        wide[...] = block
        yield rows, wide


def _unpack(packed: Packed, rows: slice, out: NumpyArray) -> None:
    """Write some rows of a packed weight into `out`, (k, in) of float32."""
    _, _, scale, bias, block, (_, inner), _ = packed
    codes: NumpyArray = packed.codes[rows, :]
    table: NumpyArray = packed.table
    # Any code is a row of the table, so `mode` only keeps NumPy from a buffer for `out`.
    np.take(table, codes, axis=0, out=out.reshape(*codes.shape, -1), mode="clip")
    for function, array in ((np.multiply, scale), (np.add, bias)):
        if array is None:
            continue
        groups: NumpyArray = out
        factor: NumpyArray
        if isinstance(block, tuple) and inner % block[1] == 0:
            groups = out.reshape(len(out), -1, block[1])
            factor = row_groups(array, block[0], rows, xp=np)[..., None]
        else:
            factor = spread(array, packed, rows, xp=np)
        function(groups, factor, out=groups)


def _elements(tokens: NumpyArray) -> int:
    """Return the size of the blocks of W. For one token, BLAS has no threads that could spin."""
    return CACHE_BLOCK if tokens.shape[-2] == 1 else PRODUCT_BLOCK


def _narrow_left(weight: NumpyArray, right: NumpyArray) -> NumpyArray:
    """Return W right, with W narrower than the result: (out, in) (in, k) -> (out, k)."""
    result = np.empty((*weight.shape[:-1], right.shape[-1]), right.dtype)
    for rows, wide in _upcast(weight, right.dtype, PRODUCT_BLOCK):
        result[..., rows, :] = wide @ right
    return result


def _narrow_transposed(x: NumpyArray, weight: NumpyArray) -> NumpyArray:
    """Return x Wᵀ, with W narrower than the result: (tokens, in), (out, in) -> (tokens, out)."""
    result = np.empty((*x.shape[:-1], weight.shape[-2]), x.dtype)
    for rows, wide in _upcast(weight, x.dtype, _elements(x)):
        result[..., rows] = x @ wide.mT
    return result


def _narrow_right(d: NumpyArray, weight: NumpyArray) -> NumpyArray:
    """Return d W, with W narrower than the result: (tokens, out), (out, in) -> (tokens, in)."""
    result = np.zeros((*d.shape[:-1], weight.shape[-1]), d.dtype)
    for rows, wide in _upcast(weight, d.dtype, _elements(d)):
        result += d[..., rows] @ wide
    return result


def _merged_blocks(
    factors: Factors, dtype: DType
) -> tuple[NumpyArray, Iterator[tuple[slice, NumpyArray]]]:
    """Return an empty W', and the blocks of rows of V in `dtype`.

    The caller scales each block in place, before it takes the next one. A block is a part of W' if
    W' has that dtype. Else it is in a buffer, and is copied to W' when the next one is taken.
    """
    weight: NumpyArray
    a: NumpyArray
    scaled_b: NumpyArray
    weight, a, scaled_b, row_scale = factors
    result = np.empty(weight.shape, weight.dtype)

    def blocks() -> Iterator[tuple[slice, NumpyArray]]:
        buffer = None
        for rows in _blocks(weight, MERGE_BLOCK):
            base, v = weight[..., rows, :], result[..., rows, :]
            if result.dtype != dtype:
                buffer = np.empty(v.shape, dtype) if buffer is None else buffer
                v = buffer[..., : v.shape[-2], :]
            np.matmul(scaled_b[..., rows, :], a, out=v)
            v += base if row_scale is None else row_scale[..., rows, None] * base
            yield rows, v
            if buffer is not None:
                result[..., rows, :] = v

    return result, blocks()


def _pick(factors: Factors, element: tuple[int, ...], rows: NumpyArray) -> Factors:
    """Return the factors of some rows of one element of the stack."""
    weight, a, scaled_b, row_scale = factors
    return Factors(
        weight[element][rows],
        a[element],
        scaled_b[element][rows],
        None if row_scale is None else row_scale[element][rows],
    )
