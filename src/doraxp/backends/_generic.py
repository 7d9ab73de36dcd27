"""The operations that a backend may replace, written in the array API standard alone.

    W (out, in)   A (rank, in)   B (out, rank)   ρ (out,) or None for 1   V = ρ⊙W + s B A
    n = ‖V‖ by rows (out,)       g = m / n       z = x Vᵀ (tokens, out)

A backend is a subclass. It overrides an operation only if measurements show that this is faster,
and keeps the signature, which mypy checks. W, x and d have the dtype that they are stored in, or
the compute dtype. All other arrays have the compute dtype. Every array may have the same leading
axes, a stack.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, cast

import array_api_compat

from doraxp._base.ranks import sums
from doraxp._base.types import (
    AdamWLeaves,
    AdamWNumbers,
    AdamWStepped,
    Adapter,
    Array,
    Consumed,
    DType,
    Namespace,
    Reduce,
    RowWeight,
    Snapshot,
)
from doraxp.backends._direction import (
    Dense,
    Direction,
    Factored,
    Factors,
    ProductDirection,
    form,
)
from doraxp.backends._dtypes import as_dtype, compute_dtype, transpose
from doraxp.backends._layers import LayerOperations
from doraxp.backends._namespaces import device
from doraxp.backends._packed import Packed, unpacked

# The expanded n² is a sum of terms that may cancel. A row is trusted if n² is above this fraction
# of the terms. The rounding error of n is 3 ulp at a half, and 500 ulp at a hundredth. A row is
# below only if B A points against W and is about as large.
CANCELLATION = 0.5

# Tokens that are added up in one chain. The error of a chain grows with its length: at 131,072
# tokens it is 130 times that of the dense formula. Chains that are shorter than this take longer.
CHAIN = 64

# Numbers of a block of rows of a weight that is given by rows: 16 MiB in float32.
ROW_BLOCK = 1 << 22


class Norm(NamedTuple):
    """The results of `Operations.norm_and_direction`."""

    norm: Array
    """n = ‖V‖ by rows, (*stack, out)."""
    gain: Array
    """g = m / n, and 0 where n = 0, (*stack, out)."""
    unit_projection: Array
    """V Aᵀ / n, and 0 where n = 0, (*stack, out, rank)."""
    direction: Direction
    """V."""


class OutputGradients(NamedTuple):
    """The results of `Operations.output_gradients`."""

    rows: Array
    """dz = g⊙dy, and below it (q⊙(s B))ᵀ where the norm has a gradient: (*stack, tokens + k, out),
    with k = rank or 0. q = −p / n."""
    rows_b: Array
    """rows (s B), (*stack, tokens + k, rank)."""
    magnitude: Array
    """dm = e / n, (*stack, out), with e = Σ_tokens dy⊙z."""
    radial: Array | None
    """p = g⊙dm, (*stack, out); None where the norm has no gradient."""
    bias: Array | None
    """Σ_tokens dy, (*stack, out); None where it was not asked for."""


class LayerGradients(NamedTuple):
    """The results of `Operations.gradients`."""

    x: Array
    """dz V, (*stack, tokens, in)."""
    lora_a: Array
    """dA = (dz s B)ᵀ x~ + (q⊙(s B))ᵀ V, (*stack, rank, in)."""
    lora_b: Array
    """dB = s (dzᵀ L − p⊙(V Aᵀ / n)), (*stack, out, rank)."""
    magnitude: Array
    """dm = e / n, (*stack, out)."""
    radial: Array | None
    """p = g⊙dm, (*stack, out); None where the norm has no gradient."""
    bias: Array | None
    """Σ_tokens dy, (*stack, out); None where it was not asked for."""


class Operations(LayerOperations):
    """The operations on arrays of the namespace `xp`."""

    def __init__(self, xp: Namespace) -> None:
        self.xp = xp

    # Arrays

    def can_read_values(self, array: Array) -> bool:
        """Return whether the host may read a value of `array`, at little cost.

        False on a device, where reading waits for the queue, and for lazy or traced arrays.
        """
        if array_api_compat.is_lazy_array(array):
            return False
        return "cpu" in str(device(array)).lower()

    def check_device(self, name: str, array: Array) -> None:
        """Refuse an array on another device than the one that runs the operations."""

    def device(self, array: Array) -> object:
        """Return the device on which an array of another shape is made beside `array`."""
        return device(array)

    def detached(self, array: Array) -> Array:
        """Return `array` outside of any graph that its library records for gradients."""
        return array

    def operand_dtype(
        self, array: Array, weight: Array, dtype: DType, *, masked: bool = False,
        z: DType | None = None,
    ) -> DType:  # fmt: skip
        """Return the dtype in which products take x or dy: here `dtype`, the compute dtype.

        A backend whose products of two 16-bit arrays come out in the compute dtype returns the
        array's own dtype. That saves a cast. `masked` says that the array will be multiplied by a
        dropout mask, in the dtype that is returned. `z` is the dtype of z where it is known: a
        backward rounds as its forward did, and a z that is summed over ranks is not rounded.
        """
        return dtype

    # Products

    def product(self, left: Array, right: Array) -> Array:
        """Return left right, (*stack, i, k) (*stack, k, j) -> (*stack, i, j), in the wider dtype.

        One of the two may be the stored weight, or its transpose, in a narrower dtype.
        """
        if left.dtype != right.dtype:
            dtype = compute_dtype(left, right, xp=self.xp)
            left, right = (as_dtype(array, dtype, xp=self.xp) for array in (left, right))
        return left @ right

    def product_with_transposed(self, left: Array, right: Array) -> Array:
        """Return left rightᵀ, (*stack, i, k) (*stack, j, k) -> (*stack, i, j), as `product` does.

        `right` may be the stored weight.
        """
        return self.product(left, transpose(right))

    def accumulate(self, total: Consumed, left: Array, right: Array) -> Array:
        """Return total + left right, (*stack, tokens, k)."""
        total += left @ right
        return total

    # Weights that are given by rows

    def whole(self, weight: Array) -> Array:
        """Return a weight as an array: itself, or all rows of one that is given by rows."""
        return weight

    def block_size(self, weight: RowWeight, tokens: int) -> int:
        """Return how many numbers a block of rows of W should have, for this many tokens."""
        return ROW_BLOCK

    def unpacked(self, packed: Packed, rows: slice, buffer: Consumed | None = None) -> Array:
        """Return some rows of a packed weight, (k, in), in its dtype.

        A `buffer` is the result of an earlier call, for at least as many rows. A library whose
        arrays can be written to may write the result there.
        """
        return unpacked(packed, rows, xp=self.xp)

    # Before and after the products with V

    def forward_epilogue(
        self, z: Consumed, row_scale: Array | None, update: tuple[Array, Array] | None,
        gain: Array, bias: Array | None,
    ) -> tuple[Array, Array]:  # fmt: skip
        """Return z ← ρ⊙z + L (s B)ᵀ for `update` = (L, s B), and y = g⊙z + bias.

        Both are (*stack, tokens, out). `row_scale` = None means ρ = 1, `update` = None means 0.
        """
        if row_scale is not None:
            z *= row_scale[..., None, :]
        if update is not None:
            low, scaled_b = update
            z = self.accumulate(z, low, transpose(scaled_b))
        y = gain[..., None, :] * z
        if bias is not None:
            y += bias[..., None, :]
        return z, y

    def output_gradients(
        self, d: Array, z: Array, gain: Array, norm: Array, scaled_b: Array,
        *, exact: bool, with_bias: bool,
    ) -> OutputGradients:  # fmt: skip
        """Return dz, dm, dz s B, and the rows of the gradient through the norm.

        d = dy and z are (*stack, tokens, out). `exact` asks for the gradient through the norm,
        `with_bias` for Σ_tokens dy. q = −p / n is never computed by itself: it overflows where
        n is tiny, and q⊙(s B) does not.
        """
        xp = self.xp
        dbias = self.token_sums(d) if with_bias else None
        dz = gain[..., None, :] * d
        dm = self.over_norm(self.token_sums(d * z), norm)
        dz_b = dz @ scaled_b
        if not exact:
            return OutputGradients(dz, dz_b, dm, None, dbias)
        p = gain * dm
        below = transpose(self.over_norm(-p[..., None] * scaled_b, norm))
        # Not one product: tokens may be sharded over devices, and `below` is whole on each of them.
        rows_b = xp.concat([dz_b, below @ scaled_b], axis=d.ndim - 2)
        return OutputGradients(xp.concat([dz, below], axis=d.ndim - 2), rows_b, dm, p, dbias)

    def gradients(
        self, d: Array, x: Array, low: Array, z: Array, norm: Norm, scaling: float, dtype: DType,
        *, exact: bool, with_bias: bool, round_later: bool,
    ) -> LayerGradients:  # fmt: skip
        """Return dz V, dA, dB and dm, given dy, x~, L = x~ Aᵀ and z.

        d and z are (*stack, tokens, out), x is (*stack, tokens, in). dz V is in `dtype`; with
        `round_later` it is in the compute dtype, and the caller rounds it later. `exact` asks for
        the gradient through the norm, `with_bias` for Σ_tokens dy.
        """
        tokens, direction = d.shape[-2], cast(ProductDirection, norm.direction)
        scaled_b = direction.factors.scaled_b
        rows, rows_b, dm, p, dbias = self.output_gradients(
            d, z, norm.gain, norm.norm, scaled_b, exact=exact, with_bias=with_bias
        )
        dz, dz_b = rows[..., :tokens, :], rows_b[..., :tokens, :]
        db = self.product(transpose(dz), low)
        if p is not None:
            db -= p[..., None] * norm.unit_projection
        db *= scaling
        da = self.product(transpose(dz_b), x)
        # rows V = [dz V; (q⊙(s B))ᵀ V]
        dx, pull = direction.product(rows, rows_b, tokens, dtype, round_later=round_later, ops=self)
        if p is not None:
            da += pull
        return LayerGradients(dx, da, db, dm, p, dbias)

    def token_sums(self, array: Array) -> Array:
        """Return the sums over the tokens, (*stack, tokens, out) -> (*stack, out)."""
        return token_sums(array, xp=self.xp)

    def over_norm(self, values: Array, norm: Array) -> Array:
        """Return values / n by rows, and 0 where n = 0; values are (*stack, out[, k])."""
        return over_norm(values, norm, xp=self.xp)

    # The norm

    def row_dots(self, left: Array, right: Array) -> Array:
        """Return the scalar products of rows, twice (*stack, out, rank) -> (*stack, out)."""
        return self.xp.vecdot(left, right)

    def row_squares(self, weight: Array, dtype: DType) -> Array:
        """Return ‖wᵢ‖² by rows, (*stack, out, in) -> (*stack, out), in `dtype`."""
        wide = as_dtype(weight, dtype, xp=self.xp)
        return self.xp.sum(wide * wide, axis=-1)

    def row_norms(self, weight: Array, squares: Array, reduce: Reduce | None = None) -> Array:
        """Return ‖wᵢ‖, given ‖wᵢ‖² (*stack, out), which may have overflowed or underflowed.

        With `reduce`, `squares` are sums over ranks that each hold a part of the input axis.
        """
        trusted = in_range(squares, weight.shape[-1], xp=self.xp)
        if self.can_read_values(trusted) and bool(self.xp.all(trusted)):
            return self.xp.sqrt(squares)
        return safe_row_norms(as_dtype(weight, squares.dtype, xp=self.xp), reduce, xp=self.xp)

    def norm_and_direction(
        self, weight: Array, adapter: Adapter, scaling: float, row_scale: Array | None,
        squares: Array, products: tuple[Array, Array] | None = None, reduce: Reduce | None = None,
    ) -> Norm:  # fmt: skip
        """Return n, g = m / n, V Aᵀ / n and V, without forming V where the factors suffice.

        ::

            U    = ρ⊙(W Aᵀ)                                             (out, rank)
            G    = A Aᵀ                                                 (rank, rank)
            n²   = ρ²⊙‖w‖² + 2 rowsum(s B⊙U) + rowsum((s B G)⊙s B)      (out,)
            V Aᵀ = U + s B G                                            (out, rank)

        The caller gives squares = ‖w‖², in the compute dtype, and may give `products` = (W Aᵀ, G);
        with `reduce` it must, and all three are sums over the ranks. The adapter may be stored in
        any dtype. In rows where n² may have lost digits, n is measured on V itself.
        """
        xp, dtype = self.xp, squares.dtype
        a, b, magnitude = (as_dtype(leaf, dtype, xp=xp) for leaf in adapter)
        if products is None:
            transposed = transpose(a)
            products = self.product(weight, transposed), self.product(a, transposed)
        factors = Factors(weight, a, b if scaling == 1 else scaling * b, row_scale)
        expanded = self._expanded_norm(
            *products, squares, factors.scaled_b, row_scale, weight.shape[-1]
        )
        return self._guarded_norm(*expanded, factors, magnitude, reduce)

    def _expanded_norm(
        self, u: Array, gram: Array, squares: Array, scaled_b: Array, row_scale: Array | None,
        terms: int,
    ) -> tuple[Array, Array, Array]:  # fmt: skip
        """Return n and V Aᵀ by their expansion, and a mask of the rows that kept their digits.

        The formulas are those of `norm_and_direction`. Each of ‖w‖² and G is a sum of `terms`
        numbers.
        """
        xp = self.xp
        base = squares
        if row_scale is not None:
            base = xp.astype(row_scale > 0, u.dtype)  # ρ²⊙‖w‖² is 1, and 0 for a row of zeros
            u = row_scale[..., None] * u
        bg = scaled_b @ gram  # (out, rank)
        update = self.row_dots(bg, scaled_b)  # ‖s(BA)ᵢ‖²
        n2 = base + 2 * self.row_dots(scaled_b, u) + update

        # A row is trusted if n² is not small beside its terms. The term `update` is a sum that may
        # cancel too, if the rows of A are nearly dependent. So it counts as no less than it would
        # be if these rows were orthogonal: Σ_r (s bᵢᵣ)² ‖A_r‖². `least` allows for squares that
        # underflowed.
        least = least_sum(u.dtype, terms, xp=xp)
        *stack, rank, _ = gram.shape
        a_squares = xp.reshape(gram, (*stack, rank * rank))[..., :: rank + 1] + least  # ‖A_r‖²
        # Not of (s B)², which may underflow where its product with ‖A_r‖² does not.
        orthogonal = self.row_dots(scaled_b * a_squares[..., None, :], scaled_b)
        update = xp.maximum(update, orthogonal)
        trusted = (n2 > CANCELLATION * (base + update) + least) & (n2 < float("inf"))
        return xp.sqrt(xp.abs(n2)), u + bg, trusted  # a row with n² < 0 is not trusted

    def _guarded_norm(
        self, norm: Consumed, projection: Array, trusted: Array, factors: Factors,
        magnitude: Array, reduce: Reduce | None,
    ) -> Norm:  # fmt: skip
        """Return the results of `norm_and_direction`, given those of `_expanded_norm`."""
        norm, direction = self._measure_on_v(trusted, norm, factors, reduce)
        if reduce is None:
            projection = direction.projection(projection, ops=self)
        elif not isinstance(direction, Factored):
            part = direction.projection(self.xp.zeros_like(projection), ops=self)
            (total,) = sums(reduce, part, xp=self.xp)
            # The trusted rows are sums over the ranks already.
            projection = self.xp.where(trusted[..., None], projection, total)
        gain, unit = self.over_norm(magnitude, norm), self.over_norm(projection, norm)
        return Norm(norm, gain, unit, direction)

    def _measure_on_v(
        self, trusted: Array, norm: Consumed, factors: Factors, reduce: Reduce | None
    ) -> tuple[Array, ProductDirection]:
        """Return the norms and V. In rows that are not trusted, the norm is measured on V.

        Here V is stored whole, unless the host can read that every row is trusted: the standard
        cannot select rows. That costs an array (out, in) each time that the adapter changes.
        With `reduce`, each rank stores its part of V.
        """
        if self.can_read_values(trusted) and bool(self.xp.all(trusted)):
            return norm, Factored(factors)
        v = form(factors, norm.dtype, xp=self.xp)
        return safe_row_norms(v, reduce, xp=self.xp), Dense(factors, v)

    # Merging

    def merge(self, direction: Direction, gain: Array) -> Array:
        """Return W' = g⊙V, (*stack, out, in), in the weight's dtype."""
        merged = gain[..., None] * direction.dense(ops=self)
        return as_dtype(merged, direction.factors.weight.dtype, xp=self.xp)

    def merge_and_measure(self, factors: Factors, magnitude: Array) -> Array:
        """Return W' = (m / n)⊙V in the weight's dtype, with n by `norm_and_direction`."""
        weight, a, scaled_b, row_scale = factors
        # With ρ, the norm does not read ‖w‖²: ρ²⊙‖w‖² is 1, or 0 for a row of zeros.
        squares = self.row_squares(weight, a.dtype) if row_scale is None else row_scale
        leaves = Adapter(a, scaled_b, magnitude)
        found = self.norm_and_direction(weight, leaves, 1.0, row_scale, squares)
        return self.merge(found.direction, found.gain)

    # Optimizers

    def solve(self, matrix: Array, right: Array) -> Array:
        """Return M⁻¹ right for symmetric positive definite M, (*stack, k, k) (*stack, k, j)."""
        linalg = getattr(self.xp, "linalg", None)  # an extension, which a library may not have
        if linalg is None:
            return solve_by_elimination(matrix, right, xp=self.xp)
        solution: Array = linalg.solve(matrix, right)
        return solution

    def adamw(
        self, leaves: AdamWLeaves, rates: Sequence[float | Array],
        decays: Sequence[float | Array], numbers: AdamWNumbers, *, donate: bool,
    ) -> AdamWStepped:  # fmt: skip
        """Return p, mu and nu after a step of AdamW; `doraxp.adamw_step` has the formula.

        p keeps its dtype. A rate η or decay λ is a float, or a 0-d array where it is traced. With
        `donate`, the results may be written into p, mu and nu.
        """
        each = zip(*leaves, rates, decays, strict=True)
        steps = [self._adamw_of_one(*arrays, numbers=numbers) for arrays in each]
        return AdamWStepped(*zip(*steps, strict=True))

    def _adamw_of_one(
        self, param: Array, grad: Array, mu: Array, nu: Array, rate: float | Array,
        decay: float | Array, *, numbers: AdamWNumbers,
    ) -> tuple[Array, Array, Array]:  # fmt: skip
        """Return p, mu and nu of one parameter after a step of AdamW."""
        xp, dtype = self.xp, mu.dtype
        rate, decay, correction1, correction2 = (
            # NumPy's float64 is a float too, but it would widen float32 arrays.
            number if type(number) is float else xp.astype(number, dtype, copy=False)
            for number in (rate, decay, numbers.correction1, numbers.correction2)
        )
        p, g = (xp.astype(array, dtype, copy=False) for array in (param, grad))
        mu = numbers.beta1 * mu + numbers.rest1 * g
        nu = numbers.beta2 * nu + numbers.rest2 * (g * g)
        mean, square = mu / correction1, nu / correction2
        p = p - rate * (mean / (xp.sqrt(square) + numbers.eps) + decay * p)
        return xp.astype(p, param.dtype, copy=False), mu, nu

    # A prepared norm must not be used with another adapter

    def snapshot(self, adapter: Adapter) -> Snapshot | None:
        """Return a copy by which `unchanged` notices a later write; None if values are not read."""
        if not self.can_read_values(adapter.lora_a):
            return None
        return Adapter(*(self.xp.asarray(self.detached(leaf), copy=True) for leaf in adapter))

    def unchanged(self, snapshot: Snapshot | None, then: Adapter, now: Adapter) -> bool:
        """Return whether `now` is still the adapter `then`, of which `snapshot` was taken.

        The arrays are compared by value, or by identity if there is no snapshot. Identity is enough
        if arrays cannot be written to. On a GPU, a write into an array is not noticed.
        """
        if not isinstance(snapshot, Adapter):
            return then is now or all(a is b for a, b in zip(then, now, strict=True))
        return all(same_values(a, b, xp=self.xp) for a, b in zip(snapshot, now, strict=True))


class LazyOperations(Operations):
    """The operations on arrays that may be lazy, of a library that array-api-compat does not know.

    `array_api_compat.is_lazy_array` reads a value to find out, which computes a graph.
    """

    def can_read_values(self, array: Array) -> bool:
        """Return False."""
        return False


def in_range(squares: Array, terms: int, *, xp: Namespace) -> Array:
    """Return a mask of the sums of `terms` squares that neither overflowed nor underflowed.

    NaN counts as out of range.
    """
    return (squares > least_sum(squares.dtype, terms, xp=xp)) & (squares < float("inf"))


def least_sum(dtype: DType, terms: int, *, xp: Namespace) -> float:
    """Return the bound below which a sum of `terms` squares may have lost digits to underflow."""
    return terms * _least_square(xp, dtype)


@functools.cache
def _least_square(xp: Namespace, dtype: DType) -> float:
    """Return the least square that has all its digits. Cached, because `finfo` takes longer."""
    info = xp.finfo(dtype)
    return float(info.smallest_normal) / float(info.eps)


def token_sums(array: Array, *, xp: Namespace) -> Array:
    """Return the sums over the tokens, (*stack, tokens, out) -> (*stack, out).

    The standard leaves the order of a sum open, and NumPy adds all rows in one chain. Here chains
    of CHAIN rows are added, and then their sums in the same way.
    """
    *stack, tokens, out = array.shape
    if not isinstance(tokens, int) or tokens <= CHAIN:  # a lazy array may not know its length
        return xp.sum(array, axis=-2)
    rest = tokens % CHAIN
    chains = xp.reshape(array[..., rest:, :], (*stack, tokens // CHAIN, CHAIN, out))
    total = token_sums(xp.sum(chains, axis=-2), xp=xp)
    return total + xp.sum(array[..., :rest, :], axis=-2) if rest else total


def over_norm(values: Array, norm: Array, *, xp: Namespace) -> Array:
    """Return values / n by rows, and 0 where n = 0; values are (*stack, out[, k])."""
    norm = xp.reshape(norm, (*norm.shape, *(1,) * (values.ndim - norm.ndim)))
    nonzero = norm != 0
    return xp.where(nonzero, values / xp.where(nonzero, norm, 1.0), 0.0)


def solve_by_elimination(matrix: Array, right: Array, *, xp: Namespace) -> Array:
    """Return M⁻¹ right by Gauss-Jordan elimination, which needs no pivots where M is positive.

    Each of the k steps makes one column of M that of the identity matrix.
    """
    size = matrix.shape[-1]
    both = xp.concat([matrix, right], axis=matrix.ndim - 1)
    one = xp.eye(size, dtype=xp.bool, device=device(matrix))
    for k in range(size):
        row = both[..., k : k + 1, :] / both[..., k : k + 1, k : k + 1]
        both = xp.where(one[:, k : k + 1], row, both - both[..., :, k : k + 1] * row)
    return both[..., :, size:]


def safe_row_norms(rows: Array, reduce: Reduce | None = None, *, xp: Namespace) -> Array:
    """Return ‖vᵢ‖ without overflow or underflow: (*stack, out, in) -> (*stack, out).

    With `reduce`, each rank holds a part of every row.
    """
    peak = xp.max(xp.abs(rows), axis=-1)
    scale = xp.where(peak > 0, peak, xp.ones_like(peak))
    unit = rows / scale[..., None]
    norm = scale * xp.sqrt(xp.sum(unit * unit, axis=-1))
    if reduce is None:
        return norm
    (bound,) = sums(reduce, norm, xp=xp)  # at least ‖vᵢ‖, at most √ranks ‖vᵢ‖
    share = over_norm(norm, bound, xp=xp)
    return bound * xp.sqrt(sums(reduce, share * share, xp=xp)[0])


def same_values(a: Array, b: Array, *, xp: Namespace) -> bool:
    """Return whether two arrays have one shape, one dtype and the same values; NaN equals NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(xp.all(a == b)) or bool(xp.all((a == b) | ((a != a) & (b != b))))
