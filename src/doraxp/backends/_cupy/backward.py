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
from doraxp.backends._cupy.passes import Passes, RowSums, suspect_part
from doraxp.backends._cupy.products import FEW, FLOAT_PARTS, ROUNDED, Products
from doraxp.backends._cupy.skinny import Skinny
from doraxp.backends._dtypes import transpose
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
        xp = self.xp
        d, x, low, z = (packed(array, xp) for array in (d, x, low, z))
        mixed = name_of(z) in LOW and d.dtype == x.dtype == z.dtype
        work, kind = self._mixed, norm.gain.dtype if round_later else dtype
        if not mixed:
            work, z = self._wide, xp.astype(z, norm.gain.dtype, copy=False)
        dx, da, sums = work(
            d, x, low, z, norm, direction, scaling, kind, exact=exact, with_bias=with_bias
        )
        return LayerGradients(dx, da, sums.lora_b, sums.magnitude, sums.radial, sums.bias)

    def _mixed(
        self, d: DeviceArray, x: DeviceArray, low_rank: DeviceArray, z: DeviceArray, norm: Norm,
        direction: DevicePatched, scaling: float, dtype: DType, *, exact: bool, with_bias: bool,
    ) -> tuple[DeviceArray, DeviceArray, RowSums]:  # fmt: skip
        """Return dx, dA and the other gradients. dz is rounded to W's dtype, for dx alone."""
        passes, found = self.passes, direction.suspects
        weight, a, *_ = found.factors
        dz, along, totals, low_sums, db_sums = passes.mixed_gradients(
            d, z, low_rank, norm.gain, found, total=with_bias
        )
        sums = passes.row_gradients(
            along, totals, db_sums, found, norm.gain, norm.norm, norm.unit_projection, scaling,
            by_rank=True, exact=exact, low_sums=low_sums,
        )  # fmt: skip
        low = sums.low
        part = suspect_part(found, d, x, norm.gain, norm.norm, sums.radial)
        dx = passes.update(low, a, dtype, weight.dtype, part=part)
        self.products.multiply(dz, weight, dtype, out=dx, beta=1.0)
        if sums.pull is None:
            partial = self.skinny.partial_pull(low, x)
        else:
            partial = self.skinny.partial_pull(low, x, sums.pull, weight)
        return dx, passes.gradient_a(partial, sums.square, part), sums

    def _wide(
        self, d: DeviceArray, x: DeviceArray, low_rank: DeviceArray, z: DeviceArray, norm: Norm,
        direction: DevicePatched, scaling: float, dtype: DType, *, exact: bool, with_bias: bool,
    ) -> tuple[DeviceArray, DeviceArray, RowSums]:  # fmt: skip
        """Return dx, dA and the other gradients. The norm's rows lie below dz, for one product."""
        xp, passes, products, found = self.xp, self.passes, self.products, direction.suspects
        weight, a, scaled_b, _ = found.factors
        rows, along, totals = passes.gradients(d, z, norm.gain, found, a.shape[-2], total=with_bias)
        narrow = name_of(d) in LOW and name_of(low_rank) == "float32"
        if narrow:
            db_sums = self.skinny.partial_pull(low_rank, d)
        else:
            db_sums = packed(products.product(transpose(d), low_rank), xp)
        sums = passes.row_gradients(
            along, totals, db_sums, found, norm.gain, norm.norm, norm.unit_projection, scaling,
            by_rank=narrow, exact=exact, rows=rows,
        )  # fmt: skip
        multiply, kind, tokens = products.multiply, rows.dtype, d.shape[-2]
        b = scaled_b if sums.over is None else sums.over
        low = multiply(rows, b, kind, whole=name_of(weight) in LOW)  # (tokens + rank, rank)
        part = suspect_part(found, d, x, norm.gain, norm.norm, sums.radial)
        result = passes.update(low, a, kind, weight.dtype, part=part)
        # Rounded to the dtype of W, the first rows keep no more digits than W has.
        few = tokens <= FEW or dtype != weight.dtype or name_of(weight) != "bfloat16"
        split = [(slice(None), FLOAT_PARTS)]
        if not few:
            split = [(slice(tokens), ROUNDED), (slice(tokens, None), FLOAT_PARTS)]
        for chosen, parts in split:
            out = result[..., chosen, :]
            multiply(rows[..., chosen, :], weight, kind, out=out, beta=1.0, parts=parts)
        dx, da = result[..., :tokens, :], result[..., tokens:, :]
        multiply(transpose(low[..., :tokens, :]), x, kind, out=da, beta=1.0)
        return products.cast(dx, dtype), da, sums
