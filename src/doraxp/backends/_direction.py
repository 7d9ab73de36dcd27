"""The direction V of an adapted weight, as one object: products with V, and V itself.

    W (out, in)   A (rank, in)   B (out, rank)   ρ (out,), None for 1     V = ρ⊙W + s B A
    x (tokens, in)    L = x Aᵀ (tokens, rank)    z = x Vᵀ (tokens, out)    d (tokens, out)

`Factored` multiplies by W, A and s B and never stores V. `Dense` stores V. A backend may have
another direction, for a V of which only a few rows must be stored.
Every array may have the same leading axes, a stack: (*stack, out, in) and so on.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from doraxp._base.types import Array, Consumed, DType, Namespace
from doraxp.backends._dtypes import as_dtype, transpose


class Factors(NamedTuple):
    """The arrays of which V is made."""

    weight: Array
    """W, in the dtype that it is stored in."""
    lora_a: Array
    """A, in the compute dtype."""
    scaled_b: Array
    """s B, in the compute dtype."""
    row_scale: Array | None
    """ρ, in the compute dtype; None for 1."""


class Arithmetic(Protocol):
    """The operations that a direction calls."""

    xp: Namespace

    def product(self, left: Array, right: Array) -> Array:
        """Return left right."""

    def product_with_transposed(self, left: Array, right: Array) -> Array:
        """Return left rightᵀ."""

    def accumulate(self, total: Consumed, left: Array, right: Array) -> Array:
        """Return total + left right."""

    def forward_epilogue(
        self, z: Consumed, row_scale: Array | None, update: tuple[Array, Array] | None,
        gain: Array, bias: Array | None,
    ) -> tuple[Array, Array]:  # fmt: skip
        """Return z ← ρ⊙z + L (s B)ᵀ, and y = g⊙z + bias."""


class Direction(Protocol):
    """V = ρ⊙W + s B A."""

    @property
    def factors(self) -> Factors:
        """The arrays of which V is made."""

    def outputs(
        self, x: Array, low: Array, gain: Array, bias: Array | None,
        base: Consumed | None = None, dropped: Array | None = None, *, ops: Arithmetic,
    ) -> tuple[Array, Array]:  # fmt: skip
        """Return z = x Vᵀ and y = g⊙z + bias: (*stack, tokens, in) -> twice (*stack, tokens, out).

        `low` is L = x Aᵀ, and `base` is x Wᵀ where the caller knows it. With `dropped` = x~, x~
        is the input of the update s B A: z = ρ⊙(x Wᵀ) + L (s B)ᵀ with L = x~ Aᵀ.
        """

    def dense(self, *, ops: Arithmetic) -> Array:
        """Return V, shape (*stack, out, in), in the compute dtype."""

    def with_weight(self, weight: Array) -> Direction:
        """Return the direction with another object for W.

        A product with the direction needs a W with the same numbers.
        """


class ProductDirection(Direction, Protocol):
    """A direction with the products that the generic operations need, and a forward with `reduce`.

    A backend that overrides `norm_and_direction` and `gradients` may do without them: its own
    direction is then a `Direction` alone, for calls without `reduce`.
    """

    def transposed_product(
        self, x: Array, low: Array, base: Consumed | None = None, dropped: Array | None = None,
        *, ops: Arithmetic,
    ) -> Array:  # fmt: skip
        """Return the z of `outputs`. The caller sums it over the ranks before it makes y."""

    def product(
        self, d: Consumed, d_b: Consumed, tokens: int, dtype: DType,
        *, round_later: bool = False, ops: Arithmetic,
    ) -> tuple[Array, Array]:  # fmt: skip
        """Return d V: (*stack, tokens + k, out) -> (*stack, tokens, in) and (*stack, k, in).

        `d_b` is d (s B), which the caller has made for dA. The first result is in `dtype`, the
        second in the compute dtype. With `round_later` both are in the compute dtype: the caller
        rounds the first to `dtype` later.
        """

    def projection(self, factored: Array, *, ops: Arithmetic) -> Array:
        """Return V Aᵀ, (*stack, out, rank), given U + s B G, which is V Aᵀ by the factors alone.

        Only the rows of V that are stored are multiplied by Aᵀ anew.
        """


class Factored(NamedTuple):
    """V given by its factors alone. V is never stored."""

    factors: Factors

    def transposed_product(
        self, x: Array, low: Array, base: Consumed | None = None, dropped: Array | None = None,
        *, ops: Arithmetic,
    ) -> Array:  # fmt: skip
        """Return ρ⊙(x Wᵀ) + L (s B)ᵀ."""
        weight, _, scaled_b, row_scale = self.factors
        z = ops.product_with_transposed(x, weight) if base is None else base
        if row_scale is not None:
            z = row_scale[..., None, :] * z
        return ops.accumulate(z, low, transpose(scaled_b))

    def outputs(
        self, x: Array, low: Array, gain: Array, bias: Array | None,
        base: Consumed | None = None, dropped: Array | None = None, *, ops: Arithmetic,
    ) -> tuple[Array, Array]:  # fmt: skip
        """Return z and y. One operation makes both, so z is read from memory once."""
        weight, _, scaled_b, row_scale = self.factors
        z = ops.product_with_transposed(x, weight) if base is None else base
        return ops.forward_epilogue(z, row_scale, (low, scaled_b), gain, bias)

    def product(
        self, d: Consumed, d_b: Consumed, tokens: int, dtype: DType,
        *, round_later: bool = False, ops: Arithmetic,
    ) -> tuple[Array, Array]:  # fmt: skip
        """Return (ρ⊙d) W + (d s B) A."""
        weight, a, _, row_scale = self.factors
        if row_scale is not None:
            d = row_scale[..., None, :] * d
        result = ops.accumulate(ops.product(d, weight), d_b, a)
        return split_rows(result, tokens, None if round_later else dtype, ops=ops)

    def projection(self, factored: Array, *, ops: Arithmetic) -> Array:
        """Return `factored`."""
        return factored

    def dense(self, *, ops: Arithmetic) -> Array:
        """Return ρ⊙W + (s B) A."""
        return form(self.factors, self.factors.lora_a.dtype, xp=ops.xp)

    def with_weight(self, weight: Array) -> Factored:
        """Return the direction with another object for W."""
        return Factored(self.factors._replace(weight=weight))


class Dense(NamedTuple):
    """V stored whole, for libraries that cannot select the suspect rows."""

    factors: Factors
    v: Array
    """V, shape (*stack, out, in), in the compute dtype."""

    def transposed_product(
        self, x: Array, low: Array, base: Consumed | None = None, dropped: Array | None = None,
        *, ops: Arithmetic,
    ) -> Array:  # fmt: skip
        """Return x Vᵀ by one product."""
        z = ops.product(x, transpose(self.v))
        return see_dropped(z, x, dropped, self.factors, ops=ops)

    def outputs(
        self, x: Array, low: Array, gain: Array, bias: Array | None,
        base: Consumed | None = None, dropped: Array | None = None, *, ops: Arithmetic,
    ) -> tuple[Array, Array]:  # fmt: skip
        """Return z and y = g⊙z + bias."""
        z = self.transposed_product(x, low, base, dropped, ops=ops)
        return ops.forward_epilogue(z, None, None, gain, bias)

    def product(
        self, d: Consumed, d_b: Consumed, tokens: int, dtype: DType,
        *, round_later: bool = False, ops: Arithmetic,
    ) -> tuple[Array, Array]:  # fmt: skip
        """Return d V by one product."""
        return split_rows(ops.product(d, self.v), tokens, None if round_later else dtype, ops=ops)

    def projection(self, factored: Array, *, ops: Arithmetic) -> Array:
        """Return V Aᵀ by one product."""
        return ops.product(self.v, transpose(self.factors.lora_a))

    def dense(self, *, ops: Arithmetic) -> Array:
        """Return the stored V."""
        return self.v

    def with_weight(self, weight: Array) -> Dense:
        """Return the direction with another object for W."""
        return Dense(self.factors._replace(weight=weight), self.v)


def form(factors: Factors, dtype: DType, *, xp: Namespace) -> Array:
    """Return V = ρ⊙W + (s B) A, shape (*stack, out, in), in `dtype`."""
    weight, a, scaled_b, row_scale = factors
    v = as_dtype(weight, dtype, xp=xp)
    if row_scale is not None:
        v = row_scale[..., None] * v
    return v + scaled_b @ a


def see_dropped(
    z: Consumed, x: Array, dropped: Array | None, factors: Factors, *, ops: Arithmetic
) -> Array:
    """Return z = x Vᵀ with x~ = `dropped` in place of x in the update: z + ((x~ − x) Aᵀ) (s B)ᵀ."""
    if dropped is None:
        return z
    low = ops.product(dropped - x, transpose(factors.lora_a))
    return ops.accumulate(z, low, transpose(factors.scaled_b))


def split_rows(
    product: Array, tokens: int, dtype: DType, *, ops: Arithmetic
) -> tuple[Array, Array]:
    """Return the first `tokens` rows (*stack, tokens + k, in) in `dtype`, and the other k rows.

    None for `dtype` keeps the dtype of the rows.
    """
    first = product[..., :tokens, :]
    return first if dtype is None else as_dtype(first, dtype, xp=ops.xp), product[..., tokens:, :]
