"""The backward on NVIDIA GPUs, where V is `DevicePatched`.

    b = s B (out, rank)   p = g⊙dm   q = −p / n   R = q⊙b (out, rank)   L = x~ Aᵀ   low = dz b

    dB = s (g⊙(dyᵀ L) − p⊙(V Aᵀ / n))      dA = lowᵀ x~ + Rᵀ V      dx = dz V
    Rᵀ V = (ρ⊙R)ᵀ W + (Rᵀ b) A             dz V = (ρ⊙dz) W + low A

dy, x and W have all their digits in their own dtype. So a gain, or a factor as wide as the rank, is
the only array that may have to be split into parts.
"""

from __future__ import annotations

from doraxp._base.types import DType, Namespace
from doraxp.backends._cupy.arrays import LOW, DeviceArray, name_of, packed
from doraxp.backends._cupy.direction import DevicePatched
from doraxp.backends._cupy.passes import Passes, RowSums, Through
from doraxp.backends._cupy.products import FEW, PARTS, ROUNDED, Products
from doraxp.backends._cupy.skinny import Skinny
from doraxp.backends._generic import LayerGradients, Norm


class Backward:
    """dz V, dA, dB and dm."""

    def __init__(self, xp: Namespace, products: Products, passes: Passes, skinny: Skinny) -> None:
        self.xp, self.products, self.passes, self.skinny = xp, products, passes, skinny

    def gradients(
        self, d: DeviceArray, x: DeviceArray, low: DeviceArray, z: DeviceArray, norm: Norm,
        direction: DevicePatched, scaling: float, dtype: DType, *, exact: bool, with_bias: bool,
        round_later: bool,
    ) -> LayerGradients:  # fmt: skip
        """Return the results of `Operations.gradients`."""
        xp, found = self.xp, direction.suspects
        d, x, low, z = (packed(array, xp) for array in (d, x, low, z))
        mixed = name_of(z) in LOW and d.dtype == x.dtype == z.dtype
        if not mixed:
            z = xp.astype(z, norm.gain.dtype, copy=False)
        room = 0 if mixed else found.factors.lora_a.shape[-2]
        rows, along, totals = self.passes.gradients(d, z, norm.gain, found, room, total=with_bias)
        narrow = name_of(d) in LOW and name_of(low) == "float32"
        if narrow:
            db_sums = self.skinny.partial_pull(low, d)
        else:
            db_sums = packed(self.products.product(xp.matrix_transpose(d), low), xp)
        sums = self.passes.row_gradients(
            along,
            totals,
            db_sums,
            found,
            norm.gain,
            norm.norm,
            norm.unit_projection,
            scaling,
            by_rank=mixed,
            exact=exact,
            rows=None if mixed else rows,
        )
        through = Through(d, x, norm.gain, norm.norm, sums.radial)
        kind = norm.gain.dtype if round_later else dtype
        work = self._mixed if mixed else self._wide
        dx, da = work(rows, x, direction, sums, through, kind)
        return LayerGradients(dx, da, sums.lora_b, sums.magnitude, sums.radial, sums.bias)

    def _mixed(
        self, dz: DeviceArray, x: DeviceArray, direction: DevicePatched, sums: RowSums,
        through: Through, dtype: DType,
    ) -> tuple[DeviceArray, DeviceArray]:  # fmt: skip
        """Return dx and dA. dz is rounded to W's dtype, for dx alone."""
        found = direction.suspects
        weight, a, *_ = found.factors
        low = self.skinny.project(through.d, found.gained, turned=True)
        dx = self.passes.update(low, a, dtype, found=found, through=through)
        self.products.multiply(dz, weight, dtype, out=dx, beta=1.0)
        if sums.pull is None:
            partial = self.skinny.partial_pull(low, x)
        else:
            partial = self.skinny.partial_pull(low, x, sums.pull, weight)
        da = self.passes.gradient_a(partial, sums.square, found, through)
        return dx, da

    def _wide(
        self, rows: DeviceArray, x: DeviceArray, direction: DevicePatched, sums: RowSums,
        through: Through, dtype: DType,
    ) -> tuple[DeviceArray, DeviceArray]:  # fmt: skip
        """Return dx and dA. The rows of the norm's gradient lie below dz, for one product."""
        multiply, found, kind = self.products.multiply, direction.suspects, rows.dtype
        weight, a, scaled_b, _ = found.factors
        tokens = through.d.shape[-2]
        b = scaled_b if sums.over is None else sums.over
        low = multiply(rows, b, kind, whole=name_of(weight) in LOW)  # (tokens + rank, rank)
        result = self.passes.update(low, a, kind, found=found, through=through)
        # Rounded to the dtype of W, the first rows keep no more digits than W has.
        few = tokens <= FEW or dtype != weight.dtype or name_of(weight) != "bfloat16"
        for part, parts in ((slice(tokens), ROUNDED), (slice(tokens, None), PARTS)):
            if few:
                part, parts = slice(None), PARTS
            multiply(
                rows[..., part, :], weight, kind, out=result[..., part, :], beta=1.0, parts=parts
            )
            if few:
                break
        dx, da = result[..., :tokens, :], result[..., tokens:, :]
        of_x = self.xp.matrix_transpose(low[..., :tokens, :])
        multiply(of_x, x, kind, out=da, beta=1.0)
        return self.products.cast(dx, dtype), da
