"""The reference with the roundings of mixed precision, in which CuPy computes 16-bit layers.

    round(·)  to the storage dtype of x, dy and W       all other roundings are float32's
    ρ̃ = ρ in the direction form, 1 where ρ = 0; 1 in the weight form

    C  = round(x~ Aᵀ (s B / ρ̃)ᵀ)       z  = round(ρ̃⊙round(x Wᵀ + C))       y = round(g⊙z + bias)
    dz = round(ρ̃⊙g⊙dy)                 C′ = round(dy (g⊙s B) A)            dx = round(dz W + C′)
    e  = Σ_tokens dy⊙z                 dm = e / n                          dn = −g e / n

In the weight form, z has no second rounding. C and C′ are products of two bfloat16 parts of each
factor, by three products, and the B A of the merged weight is one of float16 parts.
dV = g⊙(dyᵀ x) + dn V/n, and with it dA, dB and dW, has no rounding to the storage dtype of its own:
only z reaches it, through e.

A suspect row cancels, overflows or underflows (docs/explanation/numerics.md, rule 2). There z is
round(x Vᵀ), and C′ = round(round(…) + Σ g⊙dy V) has the part of all such rows in dx, without a
rounded dz.

With a dropout mask M, x~ = round(M⊙x) and the rest is round(x − x~). C′ and dz V are then not
rounded. For dropout "input", x~ replaces x in z, and y = round(y + rest Wᵀ).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from doraxp._base.types import Config
from doraxp.testing._formulas import DenseFormulas, Formula
from doraxp.testing._rounding import UNIT_ROUNDOFF, Rounded

TWO_PARTS = 3 * 2.0**-16
"""The relative error of a product of two numbers that are each the sum of two bfloat16 parts. Each
loses 2⁻¹⁶ of itself, and so does the product, which leaves out the product of the second parts."""
TWO_HALVES = 2.0**-20
"""The same for float16 parts. The product loses 2⁻²¹, and up to as much again in sums that tensor
cores truncate."""


class MixedFormulas(DenseFormulas):
    """One 16-bit layer in `Rounded` numbers. `narrow` adds the rounding to the storage dtype."""

    def __init__(
        self, config: Config, arrays: Mapping[str, Any], number: Formula, narrow: Formula
    ) -> None:
        super().__init__(config, arrays, number)
        self.narrow = narrow

    # The factors of the products

    @cached_property
    def seen(self) -> Any:
        return self.x if self.mask is None else self.narrow(self.mask * self.x)

    @cached_property
    def rest(self) -> Any:
        """The part x − x~, which only W gets."""
        return self.narrow(self.x - self.seen)

    @cached_property
    def whole(self) -> Any:
        """The input of ρ⊙W as a part of V."""
        return self.x if self.low_rank_dropout else self.seen

    @cached_property
    def row_scale(self) -> Any:
        """ρ̃, (out, 1)."""
        ones = Rounded.exact(np.ones_like(self.m.value))
        if not self.in_direction_form:
            return ones
        lengths = self.w.norms()
        return ones.over(lengths).where(lengths.value > 0, ones)

    @cached_property
    def scaled_b(self) -> Any:
        return self.s * self.b

    @cached_property
    def suspect(self) -> Any:
        """The rows of V that the backend does not make from W and B A, (out, 1)."""
        limits = np.finfo(np.float32)
        least = self.w.value.shape[-1] * float(limits.smallest_normal / limits.eps)
        base, update = (part.norms().value ** 2 for part in (self.base, self.update))
        a, b = (np.sum(each.value**2, axis=-1) for each in (self.a, self.scaled_b))
        typical = b * (np.sum(a, axis=-1, keepdims=True) / self.rank + least)
        squares = self.n.value**2
        enough = (base + np.maximum(update, typical[..., None])) / 2 + least
        return ~((squares > enough) & (squares < float(limits.max)))

    # Forward

    @cached_property
    def z(self) -> Any:
        low = self.seen @ self.a.mT
        update = self.narrow(in_two_parts(low, self.scaled_b.over(self.row_scale).mT))
        z = self.narrow(self.whole @ self.w.mT + update)
        if self.in_direction_form:
            z = self.narrow(self.row_scale.mT * z)
        return z.where(~self.suspect.mT, self.formed)

    @cached_property
    def formed(self) -> Any:
        """The sums z where V is formed."""
        formed = self.whole @ self.v.mT
        if self.mask is not None and self.low_rank_dropout:
            lacking = self.seen @ self.a.mT - self.x @ self.a.mT
            formed = formed + lacking @ self.scaled_b.mT
        return self.narrow(formed)

    @cached_property
    def y(self) -> Any:
        y = self.narrow(self.gain.mT * self.z + self.bias)
        if self.mask is None or self.low_rank_dropout:
            return y
        return self.narrow(y + self.rest @ self.w.mT)

    @cached_property
    def merged(self) -> Any:
        update = in_two_parts(self.scaled_b, self.a, TWO_HALVES)
        return self.narrow(self.gain * (self.base + update))

    # Backward

    @cached_property
    def dbeside(self) -> Any:
        return 0.0 if self.mask is None else self.dy.mT @ self.rest

    @cached_property
    def dgain(self) -> Any:
        """e, (out, 1)."""
        return (self.dy * self.z).sum(-2, keepdims=True).mT

    @cached_property
    def dbase(self) -> Any:
        if self.low_rank_dropout:
            return self.gain * (self.dy.mT @ self.x) + self.through_norm
        return self.dv

    @cached_property
    def through_v(self) -> Any:
        """The gradient of x through V, (tokens, in)."""
        suspect = self.suspect.mT
        dz = self.narrow(self.row_scale.mT * (self.gain.mT * self.dy)).where(~suspect, 0.0)
        low = self.dy.where(~suspect, 0.0) @ (self.gain * self.scaled_b)  # (tokens, rank)
        of_suspect = (self.gain.mT * self.dy).where(suspect, 0.0) @ self.v
        if self.mask is not None:
            return dz @ self.w + (low @ self.a + of_suspect)
        update = self.narrow(in_two_parts(low, self.a))
        if np.any(suspect):
            update = self.narrow(update + of_suspect)
        return self.narrow(dz @ self.w + update)

    @cached_property
    def dx(self) -> Any:
        if self.mask is None:
            return self.through_v
        if self.low_rank_dropout:
            update = self.dy @ (self.gain * self.scaled_b) @ self.a
            return self.narrow(self.through_v + (self.mask - 1.0) * update)
        return self.narrow(self.mask * self.through_v - (self.mask - 1.0) * (self.dy @ self.w))


def in_two_parts(left: Rounded, right: Rounded, loss: float = TWO_PARTS) -> Rounded:
    """Return left right, where factors of two parts each lose this much of each product."""
    product = left @ right
    terms = np.abs(left.value) @ np.abs(right.value)
    return Rounded(product.value, product.error + terms * (loss / UNIT_ROUNDOFF["float32"]))
