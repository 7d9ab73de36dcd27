"""The replaceable operations, in the array API standard alone.

    W (out, in)   A (rank, in)   B (out, rank)   ρ (out,) or None for 1   V = ρ⊙W + s B A

A backend overrides what a measurement pays for, with the same signature; mypy holds it to that.
Every operation takes W in its storage dtype and computes in `dtype`; all else is in `dtype`.
Stacks: every array may have the same leading axes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import array_api_compat

from doraxp._base.ranks import sums
from doraxp._base.types import AdamWLeaf, AdamWNumbers, Adapter, Array, Reduce


class Factors(NamedTuple):
    """V, unmultiplied; without A and B it is ρ⊙W."""

    weight: Array  # W, in its storage dtype
    lora_a: Array  # A; None where there is no update
    scaled_b: Array  # s B; None where there is no update
    row_scale: Array  # ρ; None for 1


class Operations:
    """The operations on arrays of the namespace `xp`."""

    merges_in_one_pass = False
    """`merge_with` has V in the cache: n of V itself costs less there than the expanded n."""

    def __init__(self, xp: Any) -> None:
        self.xp = xp

    def may_look(self, array: Array) -> bool:
        """Say whether reading a value of `array` on the host is allowed and cheap.

        Not on a device (it stalls the queue), not where arrays are lazy or traced.
        """
        if array_api_compat.is_lazy_array(array):
            return False
        return "cpu" in str(array_api_compat.device(array)).lower()

    def check_current(self, name: str, array: Array) -> None:
        """Refuse an array that is on another device than the one that work goes to."""

    def detached(self, array: Array) -> Array:
        """Return `array` outside of any graph that its library records for gradients."""
        return array

    def operand_dtype(self, array: Array, weight: Array, dtype: Any) -> Any:
        """Return the dtype in which x or dy goes into products: here `dtype`, the compute dtype.

        Its own, where products of it and the weight come out in the compute dtype.
        """
        return dtype

    # Products with the frozen weight

    def times_transposed(self, x: Array, weight: Array, dtype: Any) -> Array:
        """Return x Wᵀ: (*stack, tokens, in), (*stack, out, in) -> (*stack, tokens, out)."""
        xp = self.xp
        return x @ xp.matrix_transpose(xp.astype(weight, dtype, copy=False))

    def times(self, d: Array, weight: Array, dtype: Any) -> Array:
        """Return d W: (*stack, tokens, out), (*stack, out, in) -> (*stack, tokens, in)."""
        return d @ self.xp.astype(weight, dtype, copy=False)

    def project(self, weight: Array, a: Array, dtype: Any) -> Array:
        """Return W Aᵀ: (*stack, out, in), (*stack, rank, in) -> (*stack, out, rank)."""
        xp = self.xp
        return xp.astype(weight, dtype, copy=False) @ xp.matrix_transpose(a)

    def row_squares(self, weight: Array, dtype: Any) -> Array:
        """Return ‖wᵢ‖² by rows: (*stack, out, in) -> (*stack, out)."""
        xp = self.xp
        wide = xp.astype(weight, dtype, copy=False)
        return xp.sum(wide * wide, axis=-1)

    def measures_direction(self, dtype: Any, rank: int) -> bool:
        """Say whether n from `direction_squares` costs less than the expanded n², for one use."""
        return False

    def direction_squares(self, factors: Factors, dtype: Any) -> Array:
        """Return ‖Vᵢ‖² by rows: (*stack, out). Where V = W it is `row_squares`, bit for bit."""
        return self.row_squares(self.form(factors, dtype), dtype)

    # What comes before and after these products

    def cast(self, array: Array, dtype: Any) -> Array:
        """Return `array` in `dtype`: itself where it is."""
        return self.xp.astype(array, dtype, copy=False)

    def product(self, left: Array, right: Array) -> Array:
        """Return left right in the compute dtype; one may be an x or dy in its own."""
        return left @ right

    def accumulate(self, total: Array, left: Array, right: Array) -> Array:
        """Return total + left right; `total` (*stack, tokens, k) may be written to."""
        total += left @ right
        return total

    def scale_and_shift(
        self, z: Array, row_scale: Array | None, update: tuple[Array, Array] | None,
        gain: Array, bias: Array | None,
    ) -> tuple[Array, Array]:  # fmt: skip
        """Return z ← ρ⊙z + L (s B)ᵀ for `update` = (L, s B), and y = g⊙z + bias.

        z (*stack, tokens, out) may be written to; ρ and `update` are None for 1 and 0.
        """
        if row_scale is not None:
            z *= row_scale[..., None, :]
        if update is not None:
            low_rank, scaled_b = update
            z = self.accumulate(z, low_rank, self.xp.matrix_transpose(scaled_b))
        y = gain[..., None, :] * z
        if bias is not None:
            y += bias[..., None, :]
        return z, y

    def outputs(
        self, x: Array, base: Array | None, factors: Factors, low_rank: Array, formed: Any,
        gain: Array, bias: Array | None,
    ) -> tuple[Array, Array]:  # fmt: skip
        """Return z = x Vᵀ = ρ⊙(x Wᵀ) + L (s B)ᵀ and y = g⊙z + bias: (*stack, tokens, out).

        `base` is x Wᵀ where that is known, `low_rank` is L, `formed` is what `guard` returned.
        """
        weight, _, scaled_b, row_scale = factors
        update = low_rank, scaled_b

        def product() -> Array:
            return self.times_transposed(x, weight, gain.dtype) if base is None else base

        def factored(_: Array) -> Array:
            return self.scale_and_shift(product(), row_scale, update, gain, None)[0]

        if formed is None:
            return self.scale_and_shift(product(), row_scale, update, gain, bias)
        z = self.guarded_times_transposed(formed, x, factored)
        return self.scale_and_shift(z, None, None, gain, bias)

    def scale_and_sum(
        self, d: Array, z: Array, gain: Array, room: int, *, total: bool = False
    ) -> tuple[Array, Array, Array | None]:
        """Return g⊙d, Σ_tokens d⊙z and with `total` Σ_tokens d; d, z (*stack, tokens, out).

        Below g⊙d there may already be `room` rows for `append`.
        """
        xp = self.xp
        totals = xp.sum(d, axis=-2) if total else None
        return gain[..., None, :] * d, xp.sum(d * z, axis=-2), totals

    def append(self, scaled: Array, rows: Array) -> Array:
        """Return g⊙d from `scale_and_sum`, and `rows` (*stack, room, out) below it."""
        return self.xp.concat([scaled, rows], axis=-2)

    def norm_rows(
        self, scaled: Array, e: Array, gain: Array, norm: Array, scaled_b: Array
    ) -> tuple[Array, Array, Array]:
        """Return dm = e / n, p = g⊙dm, and below g⊙d the rows (q⊙(s B))ᵀ, where q = −p / n.

        q itself is not formed: it overflows where n is tiny, q⊙V does not.
        """
        dm = self.over_norm(e, norm)
        p = gain * dm
        pull = self.over_norm(-p[..., None] * scaled_b, norm)  # (*stack, out, rank)
        return dm, p, self.append(scaled, self.xp.matrix_transpose(pull))

    def low_rows(self, scaled: Array, rows: Array, scaled_b: Array) -> Array:
        """Return d s B (*stack, tokens + room, rank) for g⊙d and the rows below it.

        Here by two products: over tokens that are on many devices, what is below is on all.
        """
        count = scaled.shape[-2]
        below = self.product(rows[..., count:, :], scaled_b)
        return self.xp.concat([self.product(scaled, scaled_b), below], axis=-2)

    def turning(self, db: Array, p: Array, unit_projection: Array, scaling: float) -> Array:
        """Return s (db − p⊙(V Aᵀ / n)), (*stack, out, rank): without what only lengthens V.

        `db` may be written to.
        """
        db -= p[..., None] * unit_projection
        db *= scaling
        return db

    def over_norm(self, values: Array, norm: Array) -> Array:
        """Return values / n by rows, 0 where n = 0, NaN where it is; values (*stack, out[, k])."""
        xp = self.xp
        norm = xp.reshape(norm, (*norm.shape, *(1,) * (values.ndim - norm.ndim)))
        nonzero = norm != 0
        return xp.where(nonzero, values / xp.where(nonzero, norm, 1.0), 0.0)

    # The norm

    def in_range(self, squares: Array, terms: int) -> Array:
        """Say which sums of `terms` squares lost nothing to overflow or underflow (NaN: no)."""
        return (squares > self.floor(squares.dtype, terms)) & (squares < float("inf"))

    def floor(self, dtype: Any, terms: int) -> float:
        """Return what a sum of `terms` squares must be above, to have lost nothing to underflow."""
        return terms * _least(self.xp, dtype)

    def assemble(
        self, u: Array, gram: Array, squares: Array, scaled_b: Array, row_scale: Array | None,
        terms: int, cancellation: float,
    ) -> tuple[Array, Array, Array]:  # fmt: skip
        """Return n, V Aᵀ, and which rows of both may have lost digits.

        ::

            n² = ρ²⊙‖w‖² + 2 rowsum(s B⊙U) + rowsum((s B G)⊙s B)     U = ρ⊙(W Aᵀ)
            V Aᵀ = U + s B G

        u = W Aᵀ (*stack, out, rank), gram = G = A Aᵀ. Each sum is of so many `terms`, and so are
        those of G. n² is trusted down to `cancellation` of what it is the sum of.
        """
        xp = self.xp
        base = squares
        if row_scale is not None:
            base = xp.astype(row_scale > 0, u.dtype)  # ρ²⊙‖w‖² is 1, and 0 for a row of zeros
            u = row_scale[..., None] * u
        bg = scaled_b @ gram  # (out, rank)
        update = xp.vecdot(bg, scaled_b)  # ‖s(BA)ᵢ‖²
        n2 = base + 2 * xp.vecdot(scaled_b, u) + update

        # `update` cancels too, where A's rows are nearly dependent: compare with what it would be
        # if they were orthogonal and alike.
        *stack, rank, _ = gram.shape
        diagonal = xp.reshape(gram, (*stack, rank * rank))[..., :: rank + 1]  # ‖A_r‖²
        mean_square = (xp.sum(diagonal, axis=-1) / rank)[..., None]
        b_squares = xp.vecdot(scaled_b, scaled_b)  # (out,)
        update = xp.maximum(update, b_squares * mean_square)
        trusted = (n2 > cancellation * (base + update)) & self.in_range(n2, terms)
        suspect = ~(trusted & (self.in_range(mean_square, terms) | (b_squares == 0)))
        return xp.sqrt(xp.abs(n2)), u + bg, suspect  # what is below 0 is suspect

    def norms(self, squares: Array, factors: Factors, reduce: Reduce | None = None) -> Array:
        """Return ‖Vᵢ‖ of ‖Vᵢ‖² (*stack, out), which may have left the range of the dtype."""
        suspect = ~self.in_range(squares, factors.weight.shape[-1])
        return self.guard(suspect, self.xp.sqrt(squares), factors, squares.dtype, reduce)[0]

    def adapted_norm(
        self, u: Array, gram: Array, squares: Array, factors: Factors, magnitude: Array,
        cancellation: float, reduce: Reduce | None = None,
    ) -> tuple[Array, Array, Array, Any | None]:  # fmt: skip
        """Return n, g = m / n, V Aᵀ / n, and what `guard` returned: see `assemble`.

        With `reduce`, u, `gram` and `squares` are sums over the ranks.
        """
        xp, (weight, a, scaled_b, row_scale) = self.xp, factors
        norm, projection, suspect = self.assemble(
            u, gram, squares, scaled_b, row_scale, weight.shape[-1], cancellation
        )
        norm, formed = self.guard(suspect, norm, factors, u.dtype, reduce)
        if formed is not None:
            factored = projection if reduce is None else xp.zeros_like(scaled_b)
            factored = xp.matrix_transpose(factored)
            guarded = self.guarded_times_transposed(formed, a, lambda _: factored)
            (guarded,) = sums(reduce, xp.matrix_transpose(guarded), xp=xp)
            # Over ranks, the rows that were not formed are sums already.
            projection = (
                guarded if reduce is None else xp.where(suspect[..., None], guarded, projection)
            )
        return norm, self.over_norm(magnitude, norm), self.over_norm(projection, norm), formed

    # V, formed

    def form(self, factors: Factors, dtype: Any) -> Array:
        """Return V = ρ⊙W + s B A, shape (*stack, out, in)."""
        v = self.xp.astype(factors.weight, dtype, copy=False)
        if factors.row_scale is not None:
            v = factors.row_scale[..., None] * v
        if factors.scaled_b is None:
            return v
        return v + factors.scaled_b @ factors.lora_a

    def merge(self, factors: Factors, gain: Array, dtype: Any) -> Array:
        """Return W' = g⊙V in the weight's dtype."""
        return self.merge_with(factors, lambda rows, _: gain[..., rows], dtype)

    def merge_with(
        self, factors: Factors, gain_of: Callable[[slice, Array], Array], dtype: Any
    ) -> Array:
        """Return W' = g⊙V in the weight's dtype, where g = gain_of(rows, these rows of V)."""
        v = self.form(factors, dtype)
        merged = gain_of(slice(None), v)[..., None] * v
        return self.xp.astype(merged, factors.weight.dtype, copy=False)

    def safe_row_norms(self, rows: Array, reduce: Reduce | None = None) -> Array:
        """Return ‖vᵢ‖ without overflow or underflow: (*stack, out, in) -> (*stack, out).

        With `reduce`, of rows whose parts are on many ranks.
        """
        xp = self.xp
        peak = xp.max(xp.abs(rows), axis=-1)
        scale = xp.where(peak > 0, peak, xp.ones_like(peak))
        unit = rows / scale[..., None]
        norm = scale * xp.sqrt(xp.sum(unit * unit, axis=-1))
        if reduce is None:
            return norm
        (bound,) = sums(reduce, norm, xp=xp)  # at least ‖vᵢ‖, at most √ranks of it
        share = self.over_norm(norm, bound)
        return bound * xp.sqrt(sums(reduce, share * share, xp=xp)[0])

    # The guard: rows that the factored formulas cannot serve are served by V itself

    def guard(
        self, suspect: Array, norm: Array, factors: Factors, dtype: Any,
        reduce: Reduce | None = None,
    ) -> tuple[Array, Any | None]:  # fmt: skip
        """Form the rows of V where `suspect` (*stack, out), and measure them.

        `suspect` and `norm` may be written to.

        Returns
        -------
        norm, formed
            The norms, those of suspect rows replaced by ‖Vᵢ‖; and the formed rows for
            `guarded_times_transposed` and `guarded_times`, or None where there are none. With
            `reduce` each rank forms and keeps its part of these rows.

        Here: V whole, as rows can neither be picked out in the standard nor be looked for where
        arrays are lazy. That costs one (out, in) array for each adapter change.
        """
        if self.may_look(suspect) and not bool(self.xp.any(suspect)):
            return norm, None
        v = self.form(factors, dtype)
        return self.safe_row_norms(v, reduce), v

    def guarded_times_transposed(
        self, formed: Any, x: Array, factored: Callable[[Array], Array]
    ) -> Array:
        """Return x Vᵀ; `factored` computes it for the rows of V that were not formed."""
        return x @ self.xp.matrix_transpose(formed)

    def guarded_times(
        self, formed: Any, d: Array, low: Array, factored: Callable[[Array], Array], rounded: int
    ) -> Array:
        """Return d V; `factored` computes it for the rows of V that were not formed.

        `d` (*stack, tokens, out) and `low` = d s B (*stack, tokens, rank) may be written to. The
        first `rounded` rows of the result will be rounded to the dtype of W.
        """
        return d @ formed

    # Optimizers

    def adamw(
        self, leaves: dict[str, AdamWLeaf], rates: dict[str, float | Array],
        decays: dict[str, float | Array], numbers: AdamWNumbers,
    ) -> dict[str, tuple[Array, Array, Array]]:  # fmt: skip
        """Return p, mu and nu by path after a step of AdamW; the formula is `doraxp.adamw_step`'s.

        p keeps its dtype. A rate η or decay λ is a float, or a 0-d array where it is traced.
        """
        xp, stepped = self.xp, {}
        for path, (param, grad, mu, nu) in leaves.items():
            dtype = mu.dtype
            scalars = rates[path], decays[path], numbers.correction1, numbers.correction2
            rate, decay, correction1, correction2 = (
                # NumPy's float64 is a float too, but it would widen float32 arrays.
                number if type(number) is float else xp.astype(number, dtype, copy=False)
                for number in scalars
            )
            p, g = (xp.astype(array, dtype, copy=False) for array in (param, grad))
            mu = numbers.beta1 * mu + numbers.rest1 * g
            nu = numbers.beta2 * nu + numbers.rest2 * (g * g)
            mean, square = mu / correction1, nu / correction2
            p = p - rate * (mean / (xp.sqrt(square) + numbers.eps) + decay * p)
            stepped[path] = xp.astype(p, param.dtype, copy=False), mu, nu
        return stepped

    # A prepared norm must not outlive its adapter

    def snapshot(self, adapter: Adapter) -> Adapter | None:
        """Return what `unchanged` needs to notice that the arrays were written to."""
        if not self.may_look(adapter.lora_a):
            return None
        return Adapter(*(self.xp.asarray(self.detached(leaf), copy=True) for leaf in adapter))

    def unchanged(self, snapshot: Adapter | None, then: Adapter, now: Adapter) -> bool:
        """Say whether `now` is still the adapter `then`, of which `snapshot` was taken.

        By value where values may be looked at; by identity elsewhere, which is enough for
        libraries whose arrays are immutable, and on a GPU trusts that nobody writes to them.
        """
        if snapshot is None:
            return all(a is b for a, b in zip(then, now, strict=True))
        return all(self._equal(a, b) for a, b in zip(snapshot, now, strict=True))

    def _equal(self, a: Array, b: Array) -> bool:
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return self._all(a == b) or self._all((a == b) | ((a != a) & (b != b)))

    def _all(self, mask: Array) -> bool:
        return bool(self.xp.all(mask))


@functools.cache
def _least(xp: Any, dtype: Any) -> float:
    """Return what a square must be above to have all its digits; to ask each time takes longer."""
    info = xp.finfo(dtype)
    return float(info.smallest_normal) / float(info.eps)
