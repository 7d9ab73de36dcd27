"""V on NVIDIA GPUs: by its factors, except for suspect rows, which the kernels form.

    W (out, in)   A (rank, in)   b = s B (out, rank)   ρ (out,) or None for 1   V = ρ⊙W + b A

Only the device knows which rows are suspect, and whether there are such rows. The low-rank update
is written first, and the product with W is added to it.
"""

from __future__ import annotations

from typing import NamedTuple

from doraxp.backends._cupy.arrays import DeviceArray
from doraxp.backends._cupy.passes import Passes
from doraxp.backends._cupy.products import Products, is_mixed
from doraxp.backends._cupy.suspects import Suspects, laid
from doraxp.backends._direction import Arithmetic, Factors, form
from doraxp.backends._dtypes import transpose


class DevicePatched(NamedTuple):
    """V by its factors, except for suspect rows: kernels form these where they need them."""

    factors: Factors
    """The arrays of which V is made, as the caller gave them."""
    suspects: Suspects
    """The suspect rows, with the factors as the kernels read them."""
    passes: Passes
    products: Products

    def outputs(
        self, x: DeviceArray, low: DeviceArray, gain: DeviceArray, bias: DeviceArray | None,
        base: DeviceArray | None = None, dropped: DeviceArray | None = None, *,
        ops: Arithmetic,
    ) -> tuple[DeviceArray, DeviceArray]:  # fmt: skip
        """Return z and y: by a product and two passes, or for one token by one launch."""
        found = self.suspects
        weight, a, scaled_b, row_scale = found.factors
        dtype = x.dtype if x.dtype == weight.dtype else gain.dtype  # of y
        kind = x.dtype if is_mixed(x, weight) else gain.dtype  # of z
        if dropped is None and self.products.takes_token(x, self.factors.weight, gain.dtype):
            return self.products.token_outputs(
                x, found.factors, found.suspect, low, gain, bias, kind, dtype
            )
        shift = None
        if dropped is not None:  # low is x~ Aᵀ, and the suspect rows take x: they lack (x~ − x) Aᵀ
            shift = low - ops.product(x, transpose(a))
        z = self.passes.update(low, scaled_b, kind, weight.dtype, by_rows=True, over=row_scale)
        self.products.multiply(x, transpose(weight), kind, out=z, beta=1.0)
        y = self.passes.outputs(found, z, x, gain, bias, shift, dtype)
        return z, y

    def dense(self, *, ops: Arithmetic) -> DeviceArray:
        """Return V."""
        return form(self.factors, self.suspects.gained.dtype, xp=ops.xp)

    def with_weight(self, weight: DeviceArray) -> DevicePatched:
        """Return the direction with another object for W."""
        factors = self.factors._replace(weight=weight)
        suspects = self.suspects._replace(factors=laid(factors, self.passes.xp))
        return self._replace(factors=factors, suspects=suspects)
