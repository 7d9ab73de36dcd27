"""JAX's overrides: products over a mesh with Explicit axes, and a norm with a slope everywhere.

JAX's values cannot be read while it traces, so V is stored whole. The expansion of n² would then
be computed for nothing. An array on a mesh has a part on each device: an append of rows would move
rows between devices, so the gradients here append none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import array_api_compat

from doraxp._base.pytrees import register_config
from doraxp._base.ranks import sums
from doraxp._base.types import Adapter, DType, Namespace, Reduce
from doraxp.backends._direction import Dense, Factors
from doraxp.backends._dtypes import as_dtype, compute_dtype, transpose
from doraxp.backends._generic import LayerGradients, Norm, Operations, over_norm, safe_row_norms

JaxArray: TypeAlias = Any
"""A `jax.Array`. mypy refuses that class as the type of an argument here, because the methods
override those of `Operations`, which take any `Array`."""


class JaxOperations(Operations):
    """The operations on JAX arrays."""

    def __init__(self, xp: Namespace) -> None:
        super().__init__(xp)
        register_config()

    def device(self, array: JaxArray) -> object:
        """Return the device of `array`; None where JAX may move it; a mesh with nothing split.

        The sharding of a split array may not fit an array of another shape.
        """
        from jax import sharding

        device = array_api_compat.device(array)
        if isinstance(device, sharding.NamedSharding):
            return _named(device.mesh)
        # A traced array has no device, and its `committed` must not be asked.
        return None if device is None or not array.committed else device

    def product(self, left: JaxArray, right: JaxArray) -> JaxArray:
        """Return left right. An inner axis that is split over a mesh is summed over its devices.

        JAX refuses such a product on Explicit axes unless it is told how the result is split.
        """
        return self._contract(left, right, right.ndim - 2)

    def product_with_transposed(self, left: JaxArray, right: JaxArray) -> JaxArray:
        """Return left rightᵀ, (*stack, i, k) (*stack, j, k) -> (*stack, i, j).

        Without a transposed `right`, of which XLA on a CPU makes a copy in the transposed product.
        """
        return self._contract(left, right, right.ndim - 1)

    def _contract(self, left: JaxArray, right: JaxArray, inner: int) -> JaxArray:
        """Return the sums over the last axis of `left` and the axis `inner` of `right`."""
        from jax import lax

        if left.dtype != right.dtype:
            dtype = compute_dtype(left, right, xp=self.xp)
            left, right = (as_dtype(array, dtype, xp=self.xp) for array in (left, right))
        stack = tuple(range(left.ndim - 2))
        axes = ((left.ndim - 1,), (inner,)), (stack, stack)
        return lax.dot_general(left, right, axes, out_sharding=_sharding(left, right, inner))

    def accumulate(self, total: JaxArray, left: JaxArray, right: JaxArray) -> JaxArray:
        """Return total + left right."""
        return total + self.product(left, right)

    def gradients(
        self, d: JaxArray, x: JaxArray, low: JaxArray, z: JaxArray, norm: Norm, scaling: float,
        dtype: DType, *, exact: bool, with_bias: bool, round_later: bool,
    ) -> LayerGradients:  # fmt: skip
        """Return the gradients. The rows of the norm's gradient are multiplied by V apart from dz.

        dz may be split by tokens over a mesh, and these rows belong to no token.
        """
        xp = self.xp
        v, scaled_b = norm.direction.dense(ops=self), norm.direction.factors.scaled_b
        dbias = xp.sum(d, axis=-2) if with_bias else None
        dz = norm.gain[..., None, :] * d
        dm = self.over_norm(xp.sum(d * z, axis=-2), norm.norm)
        dx = self.product(dz, v)
        da = self.product(transpose(self.product(dz, scaled_b)), x)
        db = self.product(transpose(dz), low)
        p = norm.gain * dm if exact else None
        if p is not None:
            below = self.over_norm(-p[..., None] * scaled_b, norm.norm)  # q⊙(s B), (out, rank)
            da = da + self.product(transpose(below), v)
            db = db - p[..., None] * norm.unit_projection
        dx = dx if round_later else as_dtype(dx, dtype, xp=xp)
        return LayerGradients(dx, da, scaling * db, dm, p, dbias)

    def sums_at(self, ids: JaxArray, rows: JaxArray, count: int) -> JaxArray:
        """Return the sums of the rows that have one id, by a scatter. Saves one-hot matrices."""
        zeros: Any = self.xp.zeros((count, rows.shape[1]), dtype=rows.dtype)
        total: JaxArray = zeros.at[ids].add(rows)
        return total

    def row_norms(
        self, weight: JaxArray, squares: JaxArray, reduce: Reduce | None = None
    ) -> JaxArray:
        """Return ‖wᵢ‖, with a slope of 0 where it is 0. `squares` are not read."""
        return self._norms(as_dtype(weight, squares.dtype, xp=self.xp), reduce)

    def norm_and_direction(
        self, weight: JaxArray, adapter: Adapter, scaling: float, row_scale: JaxArray | None,
        squares: JaxArray, products: tuple[JaxArray, JaxArray] | None = None,
        reduce: Reduce | None = None,
    ) -> Norm:  # fmt: skip
        """Return n, g, V Aᵀ / n and V, measured on V. The expansion of n² is not computed."""
        xp, dtype = self.xp, squares.dtype
        a, b, magnitude = (as_dtype(leaf, dtype, xp=xp) for leaf in adapter)
        scaled_b = b if scaling == 1 else scaling * b
        v = as_dtype(weight, dtype, xp=xp)
        v = self.accumulate(v if row_scale is None else row_scale[..., None] * v, scaled_b, a)
        norm = self._norms(v, reduce)
        (projection,) = sums(reduce, self.product(v, transpose(a)), xp=xp)
        gain, unit = self.over_norm(magnitude, norm), self.over_norm(projection, norm)
        return Norm(norm, gain, unit, Dense(Factors(weight, a, scaled_b, row_scale), v))

    def _norms(self, rows: JaxArray, reduce: Reduce | None) -> JaxArray:
        """Return ‖vᵢ‖, with a slope of 0 where it is 0: (*stack, out, in) -> (*stack, out)."""
        if reduce is not None:
            return safe_row_norms(rows, reduce, xp=self.xp)
        return _differentiable_norms(self.xp)(rows)


def _sharding(left: JaxArray, right: JaxArray, inner: int) -> Any | None:
    """Return how a product over Explicit axes of a mesh is split; None where JAX can tell.

    JAX cannot tell if the inner axis of both is split, or if the rows and the columns of the result
    are split over one axis of the mesh. Then the columns are not split.
    """
    import jax

    shardings = [jax.typeof(array).sharding for array in (left, right)]
    of_left, of_right = (tuple(sharding.spec) for sharding in shardings)
    *stack, rows, summed = of_left
    columns = of_right[-1 if inner == right.ndim - 2 else -2]
    clash = _axes(*stack, rows) & _axes(columns)
    if not clash and (summed is None or of_right[inner] is None):
        return None
    stack = [a if b is None else b for a, b in zip(stack, of_right[:-2], strict=True)]
    return _named(shardings[0].mesh, *stack, rows, None if clash else columns)


def _named(mesh: Any, *split: Any) -> Any:
    """Return the sharding over a mesh, given how each axis is split."""
    from jax import sharding

    spec: Any = sharding.PartitionSpec
    return sharding.NamedSharding(mesh, spec(*split))


def _axes(*split: str | tuple[str, ...] | None) -> set[str]:
    """Return the axes of the mesh over which some axes of an array are split."""
    names = (axis if isinstance(axis, tuple) else (axis,) for axis in split if axis is not None)
    return {name for axis in names for name in axis}


@functools.cache
def _differentiable_norms(xp: Namespace) -> Callable[[JaxArray], JaxArray]:
    """Return the function from rows v to ‖v‖. Its slope is v / ‖v‖, and 0 where ‖v‖ is 0.

    The square root has no slope at 0: JAX's own gradient there is NaN.
    """
    import jax

    @jax.custom_jvp
    def norms(rows: JaxArray) -> JaxArray:
        return safe_row_norms(rows, xp=xp)

    @norms.defjvp
    def slope(primals: tuple[JaxArray], tangents: tuple[JaxArray]) -> tuple[JaxArray, JaxArray]:
        (rows,), (change,) = primals, tangents
        norm = norms(rows)
        return norm, xp.sum(over_norm(rows, norm, xp=xp) * change, axis=-1)

    found: Callable[[JaxArray], JaxArray] = norms
    return found
