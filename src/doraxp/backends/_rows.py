"""Layers whose weight is given by rows: the operations of a library, one block of rows at a time.

    W (out, in)   a `RowWeight`      Wᵢ (k, in)   a block of its rows, an array
    V = ρ⊙W + s B A                  Vᵢ = ρᵢ⊙Wᵢ + s Bᵢ A

There are two ways. Where the host can read that every row is trusted, V is `Factored`, and only the
products with W go by blocks. Else V is `Blocked`: each block of rows is a layer with a direction of
the library. The z of the blocks lie side by side, and so do the gradients of B and m; dx and dA are
sums over the blocks. So the guard and the kernels of the library see a plain array.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import array_api_compat

from doraxp._base.types import (
    Adapter,
    Array,
    Consumed,
    DType,
    Namespace,
    Reduce,
    Snapshot,
)
from doraxp.backends._direction import Arithmetic, Dense, Direction, Factored, Factors, form
from doraxp.backends._dtypes import as_dtype, transpose
from doraxp.backends._generic import (
    LayerGradients,
    LazyOperations,
    Norm,
    Operations,
    OutputGradients,
    in_range,
)

Weight: TypeAlias = Any
"""A `RowWeight`. mypy refuses that class as the type of an argument here, because the methods
override those of `Operations` and `Direction`, which take an `Array`."""


def is_by_rows(weight: object) -> bool:
    """Return whether a weight is given by rows. No array has an attribute of that name."""
    return hasattr(weight, "rows")


@functools.cache
def by_rows(ops: Operations) -> RowOperations:
    """Return the operations for weights that are given by rows, of the library of `ops`."""
    return RowOperations(ops)


class Blocked(NamedTuple):
    """V by blocks of rows, of which one at a time is in memory."""

    factors: Factors
    """The factors of V. Their weight is the `RowWeight`."""
    blocks: tuple[Direction | None, ...]
    """The direction of each block of rows, with no numbers of W or V. None stands for `Dense`."""

    def outputs(
        self, x: Array, low: Array, gain: Array, bias: Array | None,
        base: Consumed | None = None, dropped: Array | None = None, *, ops: Arithmetic,
    ) -> tuple[Array, Array]:  # fmt: skip
        """Return z = x Vᵀ and y = g⊙z + bias. `base` has V's rounding errors: it is not used."""
        inner = library(ops)
        found = [
            direction.outputs(
                x, low, gain[rows], None if bias is None else bias[rows], None, dropped, ops=inner
            )
            for rows, direction in self.directions(inner)
        ]
        z, y = (beside(parts, -1, xp=inner.xp) for parts in zip(*found, strict=True))
        return z, y

    def dense(self, *, ops: Arithmetic) -> Array:
        """Return V."""
        inner = library(ops)
        parts = [direction.dense(ops=inner) for _, direction in self.directions(inner)]
        return beside(parts, 0, xp=inner.xp)

    def with_weight(self, weight: Weight) -> Blocked:
        """Return the direction with another object for W."""
        return self._replace(factors=self.factors._replace(weight=weight))

    def directions(self, inner: Operations) -> Iterator[tuple[slice, Direction]]:
        """Yield the rows of each block, and their direction. Each overwrites the one before it."""
        weight: Weight = self.factors.weight
        read = read_blocks(weight, equal_parts(weight.shape[0], len(self.blocks)), inner)
        for (rows, block), kept in zip(read, self.blocks, strict=True):
            if kept is not None:
                yield rows, kept.with_weight(block)
                continue
            factors = some_factors(self.factors, rows, block)
            yield rows, Dense(factors, form(factors, factors.lora_a.dtype, xp=inner.xp))


def library(ops: Arithmetic) -> Operations:
    """Return the operations of the library, which compute with each block."""
    return cast(RowOperations, ops).inner


def equal_parts(count: int, parts: int) -> Iterator[slice]:
    """Yield `parts` slices of 0..count, all of one length except the last."""
    step = -(-count // parts)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def beside(parts: Sequence[Array], axis: int, *, xp: Namespace) -> Array:
    """Return arrays side by side along an axis: the array itself if there is one."""
    return parts[0] if len(parts) == 1 else xp.concat(list(parts), axis=axis)


def read_blocks(
    weight: Weight, blocks: Iterable[slice], ops: Operations
) -> Iterator[tuple[slice, Array]]:
    """Yield blocks of rows of W as arrays. Each may overwrite the one before it."""
    packed, buffer = getattr(weight, "packed", None), None
    for rows in blocks:
        if packed is None:
            yield rows, weight.rows(rows)
        else:
            buffer = ops.unpacked(packed, rows, buffer)
            yield rows, buffer


def some_factors(factors: Factors, rows: slice, weight: Array) -> Factors:
    """Return the factors of a block of rows of V; `weight` has these rows of W."""
    _, a, scaled_b, row_scale = factors
    return Factors(weight, a, scaled_b[rows, :], None if row_scale is None else row_scale[rows])


class RowOperations(Operations):
    """The operations on the arrays of a library, with a weight that is given by rows."""

    def __init__(self, inner: Operations) -> None:
        super().__init__(inner.xp)
        self.inner = inner

    # Blocks

    def blocks(self, weight: Weight, tokens: int) -> Iterator[tuple[slice, Array]]:
        """Yield blocks of rows of W, of the size that the library likes for so many tokens."""
        out, inner = weight.shape
        parts = -(-out // max(1, self.inner.block_size(weight, tokens) // inner))
        return read_blocks(weight, equal_parts(out, parts), self.inner)

    def _joined(self, parts: Iterable[tuple[slice, Array]], length: int, axis: int) -> Array:
        """Return the parts of a matrix side by side along an axis, 0 or −1, of this length."""
        whole, rest = None, []
        for rows, part in parts:
            if isinstance(self.inner, LazyOperations) or array_api_compat.is_lazy_array(part):
                rest.append(part)
                continue
            if whole is None:
                shape = (length, part.shape[1]) if axis == 0 else (part.shape[0], length)
                whole = self._zeros(shape, part)
            whole[(rows, ...) if axis == 0 else (..., rows)] = part
        return beside(rest, axis, xp=self.xp) if whole is None else whole

    def _zeros(self, shape: tuple[int, ...], like: Array) -> Any:
        """Return zeros on the device and in the dtype of `like`."""
        return self.xp.zeros(shape, dtype=like.dtype, device=self.inner.device(like))

    def whole(self, weight: Weight) -> Array:
        """Return all rows of W as an array."""
        if not is_by_rows(weight):
            return self.inner.whole(weight)
        return self._joined(self.blocks(weight, 1), weight.shape[0], 0)

    # Products

    def product(self, left: Array, right: Array) -> Array:
        """Return left right. Either may be W."""
        if is_by_rows(left):
            parts = ((rows, self.inner.product(w, right)) for rows, w in self.blocks(left, 2))
            return self._joined(parts, left.shape[0], 0)
        if not is_by_rows(right):
            return self.inner.product(left, right)
        total: Array | None = None
        for rows, weight in self.blocks(right, left.shape[-2]):
            some = left[..., rows]
            if total is None:
                total = self.inner.product(some, weight)
            elif total.dtype == weight.dtype == some.dtype:
                total = self.inner.accumulate(total, some, weight)
            else:
                total += self.inner.product(some, weight)
        assert total is not None
        return total

    def product_with_transposed(self, left: Array, right: Array) -> Array:
        """Return left Wᵀ."""
        parts = (
            (rows, self.inner.product_with_transposed(left, weight))
            for rows, weight in self.blocks(right, left.shape[-2])
        )
        return self._joined(parts, right.shape[0], -1)

    def gradients(
        self, d: Array, x: Array, low: Array, z: Array, norm: Norm, scaling: float, dtype: DType,
        *, exact: bool, with_bias: bool, round_later: bool,
    ) -> LayerGradients:  # fmt: skip
        """Return dz V, dA, dB and dm. Where V is `Blocked`, these are gradients of the blocks."""
        how = {"exact": exact, "with_bias": with_bias}
        if not isinstance(norm.direction, Blocked):
            return super().gradients(
                d, x, low, z, norm, scaling, dtype, round_later=round_later, **how
            )
        sums: list[Array] = []  # dx and dA
        by_row: list[tuple[Array | None, ...]] = []  # dB, dm, p and dbias
        for rows, direction in norm.direction.directions(self.inner):
            known = Norm(norm.norm[rows], norm.gain[rows], norm.unit_projection[rows, :], direction)
            some = self.inner.gradients(
                d[..., rows], x, low, z[..., rows], known, scaling, norm.gain.dtype,
                round_later=True, **how,
            )  # fmt: skip
            new = [some.x, some.lora_a]
            sums = [old + each for old, each in zip(sums, new, strict=True)] if sums else new
            by_row.append(some[2:])
        (dx, da), (db, dm, p, dbias) = sums, map(self._stacked, zip(*by_row, strict=True))
        assert db is not None
        assert dm is not None
        dx = dx if round_later else as_dtype(dx, dtype, xp=self.xp)
        return LayerGradients(dx, da, db, dm, p, dbias)

    def _stacked(self, parts: tuple[Array | None, ...]) -> Array | None:
        """Return the arrays of the blocks as one array; None where the blocks have none."""
        return None if parts[0] is None else beside(cast(Any, parts), 0, xp=self.xp)

    # The norm

    def row_squares(self, weight: Weight, dtype: DType) -> Array:
        """Return ‖wᵢ‖² by rows."""
        if not is_by_rows(weight):
            return self.inner.row_squares(weight, dtype)
        parts = [self.inner.row_squares(w, dtype) for _, w in self.blocks(weight, 1)]
        return beside(parts, 0, xp=self.xp)

    def row_norms(self, weight: Weight, squares: Array, reduce: Reduce | None = None) -> Array:
        """Return ‖wᵢ‖. W is read only where the host cannot tell that it is not needed."""
        if not is_by_rows(weight):
            return self.inner.row_norms(weight, squares, reduce)
        if self.can_read_values(squares):
            trusted = in_range(squares, weight.shape[-1], xp=self.xp)
            if bool(self.xp.all(trusted)):
                return self.xp.sqrt(squares)
        parts = [self.inner.row_norms(w, squares[rows]) for rows, w in self.blocks(weight, 1)]
        return beside(parts, 0, xp=self.xp)

    def norm_and_direction(
        self, weight: Weight, adapter: Adapter, scaling: float, row_scale: Array | None,
        squares: Array, products: tuple[Array, Array] | None = None, reduce: Reduce | None = None,
    ) -> Norm:  # fmt: skip
        """Return n, g, V Aᵀ / n and V. V is `Blocked` unless the host sees trusted rows only."""
        xp, dtype = self.xp, squares.dtype
        a, b, magnitude = (as_dtype(leaf, dtype, xp=xp) for leaf in adapter)
        factors = Factors(weight, a, b if scaling == 1 else scaling * b, row_scale)
        if self.can_read_values(squares):
            if products is None:
                products = self.product(weight, transpose(a)), self.product(a, transpose(a))
            norm, projection, trusted = self._expanded_norm(
                *products, squares, factors.scaled_b, row_scale, weight.shape[-1]
            )
            if bool(xp.all(trusted)):
                gain, unit = self.over_norm(magnitude, norm), self.over_norm(projection, norm)
                return Norm(norm, gain, unit, Factored(factors))
        return self._by_blocks(factors, magnitude, squares)

    def _by_blocks(self, factors: Factors, magnitude: Array, squares: Array) -> Norm:
        """Return n, g, V Aᵀ / n and V, found by the library for each block of rows."""
        found, blocks = list[Norm](), list[Direction | None]()
        for rows, weight in self.blocks(factors.weight, 2):
            _, a, scaled_b, row_scale = some_factors(factors, rows, weight)
            leaves = Adapter(a, scaled_b, magnitude[rows])
            some = self.inner.norm_and_direction(weight, leaves, 1.0, row_scale, squares[rows])
            kept = None
            if not isinstance(some.direction, Dense):
                kept = some.direction.with_weight(self._zeros((0, weight.shape[-1]), weight))
            blocks.append(kept)
            found.append(some._replace(direction=Blocked(factors, ())))
        norm, gain, unit = (
            beside([cast(Array, some[place]) for some in found], 0, xp=self.xp)
            for place in range(3)
        )
        return Norm(norm, gain, unit, Blocked(factors, tuple(blocks)))

    # Merging

    def merge(self, direction: Direction, gain: Array) -> Array:
        """Return W' = g⊙V as an array."""
        factors = direction.factors
        parts = (
            (rows, self.inner.merge(Factored(some_factors(factors, rows, weight)), gain[rows]))
            for rows, weight in self.blocks(factors.weight, 2)
        )
        return self._joined(parts, factors.weight.shape[0], 0)

    def merge_and_measure(self, factors: Factors, magnitude: Array) -> Array:
        """Return W' = (m / n)⊙V as an array. W is read once."""
        parts = (
            (
                rows,
                self.inner.merge_and_measure(some_factors(factors, rows, weight), magnitude[rows]),
            )
            for rows, weight in self.blocks(factors.weight, 2)
        )
        return self._joined(parts, factors.weight.shape[0], 0)

    # The library's own: these see no weight

    def can_read_values(self, array: Array) -> bool:
        """Return whether the host may read a value of `array`."""
        return self.inner.can_read_values(array)

    def device(self, array: Array) -> object:
        """Return the device of `array`, or of the rows of W."""
        return self.inner.device(self._first_row(array) if is_by_rows(array) else array)

    def _first_row(self, weight: Weight) -> Array:
        row: Array = weight.rows(slice(0, 1))
        return row

    def detached(self, array: Array) -> Array:
        """Return `array` outside of any graph, and W itself."""
        return array if is_by_rows(array) else self.inner.detached(array)

    def operand_dtype(
        self, array: Array, weight: Array, dtype: DType, *, masked: bool = False,
        z: DType | None = None,
    ) -> DType:  # fmt: skip
        """Return the dtype in which products take x or dy: wide ones on a host."""
        if self.can_read_values(array):
            return dtype
        return self.inner.operand_dtype(array, weight, dtype, masked=masked, z=z)

    def accumulate(self, total: Consumed, left: Array, right: Array) -> Array:
        """Return total + left right."""
        return self.inner.accumulate(total, left, right)

    def forward_epilogue(
        self, z: Consumed, row_scale: Array | None, update: tuple[Array, Array] | None,
        gain: Array, bias: Array | None,
    ) -> tuple[Array, Array]:  # fmt: skip
        """Return z ← ρ⊙z + L (s B)ᵀ, and y = g⊙z + bias."""
        return self.inner.forward_epilogue(z, row_scale, update, gain, bias)

    def output_gradients(
        self, d: Array, z: Array, gain: Array, norm: Array, scaled_b: Array,
        *, exact: bool, with_bias: bool,
    ) -> OutputGradients:  # fmt: skip
        """Return dz, dm, dz s B, and the rows of the gradient through the norm."""
        return self.inner.output_gradients(
            d, z, gain, norm, scaled_b, exact=exact, with_bias=with_bias
        )

    def over_norm(self, values: Array, norm: Array) -> Array:
        """Return values / n by rows, and 0 where n = 0."""
        return self.inner.over_norm(values, norm)

    def row_dots(self, left: Array, right: Array) -> Array:
        """Return the scalar products of rows."""
        return self.inner.row_dots(left, right)

    def snapshot(self, adapter: Adapter) -> Snapshot | None:
        """Return a copy by which `unchanged` notices a later write."""
        return self.inner.snapshot(adapter)

    def unchanged(self, snapshot: Snapshot | None, then: Adapter, now: Adapter) -> bool:
        """Return whether `now` is still the adapter `then`."""
        return self.inner.unchanged(snapshot, then, now)
