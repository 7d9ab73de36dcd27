"""V on NVIDIA GPUs: by its factors, except for suspect rows, which the guard's kernels form.

    W (out, in)   A (rank, in)   B (out, rank)   ρ (out,) or None for 1   V = ρ⊙W + s B A

Only the device knows which rows are suspect, and whether there are such rows.
"""

from __future__ import annotations

from typing import NamedTuple

from doraxp._base.types import Consumed, DType
from doraxp.backends._cupy.arrays import LOW, DeviceArray, name_of, packed
from doraxp.backends._cupy.guard import Guard, Suspects
from doraxp.backends._cupy.passes import Passes
from doraxp.backends._cupy.products import is_reduced
from doraxp.backends._direction import Arithmetic, Factored, Factors, form, see_dropped


class DevicePatched(NamedTuple):
    """V by its factors, except for suspect rows: kernels form these where they need them."""

    factors: Factors
    """The arrays of which V is made, as the caller gave them."""
    suspects: Suspects
    """The suspect rows, with the factors as the kernels read them."""
    guard: Guard
    passes: Passes

    def transposed_product(
        self, x: DeviceArray, low: DeviceArray, base: DeviceArray | None = None,
        dropped: DeviceArray | None = None, *, ops: Arithmetic,
    ) -> DeviceArray:  # fmt: skip
        """Return x Vᵀ. The guard overwrites the columns of suspect rows."""
        if dropped is not None:
            low = ops.product(x, ops.xp.matrix_transpose(self.factors.lora_a))
        z = Factored(self.factors).transposed_product(x, low, base, ops=ops)
        self.guard.outputs(self.suspects, x, z)
        return see_dropped(z, x, dropped, self.factors, ops=ops)

    def outputs(
        self, x: DeviceArray, low: DeviceArray, gain: DeviceArray, bias: DeviceArray | None,
        base: DeviceArray | None = None, dropped: DeviceArray | None = None, *,
        ops: Arithmetic,
    ) -> tuple[DeviceArray, DeviceArray]:  # fmt: skip
        """Return z and y by one pass, or for one token by one launch."""
        if base is not None or dropped is not None:
            z = self.transposed_product(x, low, base, dropped, ops=ops)
            return ops.forward_epilogue(z, None, None, gain, bias)
        weight, _, scaled_b, row_scale = self.factors
        products, xp = self.guard.products, ops.xp
        is_low = name_of(x) in LOW
        kind = x.dtype if is_low and is_reduced() else gain.dtype
        if products.takes_token(x, weight, gain.dtype):
            x, shape = packed(x, xp), (*x.shape[:-1], weight.shape[-2])
            z, y = (products.cuda.empty(shape, dtype) for dtype in (kind, x.dtype))
            products.token_outputs(x, self.factors, self.suspects.suspect, low, gain, bias, z, y)
            return z, y
        z = products.multiply(x, xp.matrix_transpose(weight), kind)
        kind = x.dtype if is_low else kind
        z, y = self.passes.outputs(z, row_scale, (low, scaled_b), gain, bias, kind)
        self.guard.outputs(self.suspects, x, z, y=y, gain=gain, bias=bias)
        return z, y

    def product(
        self, d: Consumed, d_b: Consumed, tokens: int, dtype: DType,
        *, round_later: bool = False, ops: Arithmetic,
    ) -> tuple[DeviceArray, DeviceArray]:  # fmt: skip
        """Return d V. Both arguments are overwritten."""
        # Rounded to the dtype of W, now or later, the first rows keep no more digits than W has.
        rounded = tokens if dtype == self.factors.weight.dtype else 0
        result = self.guard.product(self.suspects, d, d_b, rounded)
        dx, below = result[..., :tokens, :], result[..., tokens:, :]
        return dx if round_later else self.guard.products.cast(dx, dtype), below

    def projection(self, factored: DeviceArray, *, ops: Arithmetic) -> DeviceArray:
        """Return `factored`: the norm's kernels have replaced the suspect rows."""
        return factored

    def dense(self, *, ops: Arithmetic) -> DeviceArray:
        """Return V."""
        return form(self.factors, self.suspects.switches.dtype, xp=ops.xp)

    def with_weight(self, weight: DeviceArray) -> DevicePatched:
        """Return the direction with another object for W."""
        factors = self.factors._replace(weight=weight)
        suspects = self.suspects._replace(factors=self.guard.laid(factors))
        return self._replace(factors=factors, suspects=suspects)
