"""The operations on NVIDIA GPUs, through CuPy.

Imports without CuPy and without a GPU. Values are never read on the host.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

from doraxp._base.types import Array, Reduce
from doraxp.backends._cupy.adamw import adamw
from doraxp.backends._cupy.arrays import LOW, name_of, packed
from doraxp.backends._cupy.device import Cuda
from doraxp.backends._cupy.guard import Guard, Suspects
from doraxp.backends._cupy.passes import Passes
from doraxp.backends._cupy.patches import Patches
from doraxp.backends._cupy.products import Products, is_reduced
from doraxp.backends._generic import Factors, Operations

MEASURED = 64
"""The largest rank for which forming V takes no longer than reading W a second time."""
NEEDED = 80
"""Ten times the compute capability that the kernels need. It is the first with bfloat16."""


def why_not() -> str | None:
    """Return the reason why CuPy cannot run here, or None if it can."""
    if importlib.util.find_spec("cupy") is None:
        return "not installed: pip install 'doraxp[cuda13]', or [cuda12] for a CUDA 12 driver"
    try:
        cupy = importlib.import_module("cupy")
    except Exception as error:  # a broken CUDA installation raises more than ImportError
        return f"installed, but the import failed: {type(error).__name__}: {error}"
    if not cupy.cuda.is_available():
        return "installed, but no NVIDIA device was found (is the driver there? try nvidia-smi)"
    capability = str(cupy.cuda.Device().compute_capability)  # "75" is 7.5
    if int(capability) < NEEDED:
        return (
            f"installed, but the device is of compute capability {capability[:-1]}."
            f"{capability[-1]}, and {NEEDED / 10} is needed: no kernel compiles for it"
        )
    return None


class CupyOperations(Operations):
    """The operations on CuPy arrays: products, passes, the guard and patches of V, on one GPU."""

    def __init__(self, xp: Any, cuda: Any = None) -> None:
        super().__init__(xp)
        self.cuda = cuda or Cuda()
        self.products = Products(xp, self.cuda)
        self.passes = Passes(xp, self.cuda, self.products)
        self.device_guard = Guard(xp, self.cuda, self.products)
        self.patches = Patches(xp, self.cuda, self.products)

    def may_look(self, array: Array) -> bool:
        """Return False: reading a value waits for the whole queue."""
        return False

    def check_current(self, name: str, array: Array) -> None:
        """Refuse an array that is not on the current device, where the kernels run."""
        number = self.cuda.device()
        if array.device.id != number:
            raise ValueError(
                f"{name} is on CUDA device {array.device.id}, but the current one is {number}: "
                f"use `with cupy.cuda.Device({array.device.id}):`"
            )

    def operand_dtype(self, array: Array, weight: Array, dtype: Any) -> Any:
        """Return the own dtype of an x or dy of 16 bits like W: tensor cores take them as is."""
        own = name_of(array)
        low = own in LOW and own == name_of(weight) and np.dtype(dtype) == np.float32
        return array.dtype if low else dtype

    # Products

    def times_transposed(self, x: Array, weight: Array, dtype: Any) -> Array:
        """Return x Wᵀ, without a cast of W."""
        return self.products.multiply(x, self.xp.matrix_transpose(weight), dtype)

    def times(self, d: Array, weight: Array, dtype: Any) -> Array:
        """Return d W, without a cast of W."""
        return self.products.multiply(d, weight, dtype)

    def project(self, weight: Array, a: Array, dtype: Any) -> Array:
        """Return W Aᵀ, without a cast of W."""
        return self.products.multiply(weight, self.xp.matrix_transpose(a), dtype)

    def product(self, left: Array, right: Array) -> Array:
        """Return left right, without a cast of either, and by one launch for one token."""
        return self.products.product(left, right)

    def accumulate(self, total: Array, left: Array, right: Array) -> Array:
        """Return total ← total + left right: BLAS adds while it multiplies."""
        return self.products.multiply(left, right, total.dtype, out=total, beta=1.0)

    def cast(self, array: Array, dtype: Any) -> Array:
        """Return `array` in `dtype`."""
        return self.products.cast(array, dtype)

    def low_rows(self, scaled: Array, rows: Array, scaled_b: Array) -> Array:
        """Return d s B by one product."""
        return self.products.product(rows, scaled_b)

    # The passes over (tokens, out)

    def outputs(
        self, x: Array, base: Array | None, factors: Factors, low_rank: Array, formed: Any,
        gain: Array, bias: Array | None,
    ) -> tuple[Array, Array]:  # fmt: skip
        """Return z and y by one pass. The guard then overwrites the columns of suspect rows."""
        if not isinstance(formed, Suspects) or base is not None:
            return super().outputs(x, base, factors, low_rank, formed, gain, bias)
        low = name_of(x) in LOW
        kind = x.dtype if low and is_reduced() else gain.dtype
        weight, _, scaled_b, row_scale = factors
        if self.products.takes_token(x, weight, gain.dtype):
            x, shape = packed(x, self.xp), (*x.shape[:-1], weight.shape[-2])
            z, y = (self.cuda.empty(shape, dtype) for dtype in (kind, x.dtype))
            self.products.token_outputs(x, factors, formed.suspect, low_rank, gain, bias, z, y)
            return z, y
        z = self.products.multiply(x, self.xp.matrix_transpose(weight), kind)
        kind = x.dtype if low else kind
        z, y = self.passes.outputs(z, row_scale, (low_rank, scaled_b), gain, bias, kind)
        self.device_guard.outputs(formed, x, z, y=y, gain=gain, bias=bias)
        return z, y

    def scale_and_shift(
        self, z: Array, row_scale: Array | None, update: tuple[Array, Array] | None,
        gain: Array, bias: Array | None,
    ) -> tuple[Array, Array]:  # fmt: skip
        """Return z and y by one pass."""
        return self.passes.outputs(packed(z, self.xp), row_scale, update, gain, bias, gain.dtype)

    def scale_and_sum(
        self, d: Array, z: Array, gain: Array, room: int, *, total: bool = False
    ) -> tuple[Array, Array, Array | None]:
        """Return g⊙d and both sums by one pass over d and z."""
        rows, e, totals = self.passes.gradients(d, z, gain, room, total=total)
        return rows[..., : d.shape[-2], :], e, totals

    def norm_rows(
        self, scaled: Array, e: Array, gain: Array, norm: Array, scaled_b: Array
    ) -> tuple[Array, Array, Array]:
        """Return dm, p and the rows by one launch, which writes to the room below `scaled`."""
        rows: Array = scaled.base
        dm, p = self.passes.norm_rows(rows, scaled.shape[-2], e, gain, norm, scaled_b)
        return dm, p, rows

    def turning(self, db: Array, p: Array, unit_projection: Array, scaling: float) -> Array:
        """Return s (db − p⊙(V Aᵀ / n)) by one launch. Overwrites `db`."""
        return self.passes.turning(db, p, unit_projection, scaling)

    def over_norm(self, values: Array, norm: Array) -> Array:
        """Return values / n by one launch."""
        return self.passes.over_norm(values, norm)

    # The norm, and the guard

    def adapted_norm(
        self, u: Array, gram: Array, squares: Array, factors: Factors, magnitude: Array,
        cancellation: float, reduce: Reduce | None = None,
    ) -> tuple[Array, Array, Array, Any | None]:  # fmt: skip
        """Return n, g, V Aᵀ / n and the suspect rows, by four launches if there is no `reduce`."""
        if reduce is not None:
            return super().adapted_norm(u, gram, squares, factors, magnitude, cancellation, reduce)
        floor = self.floor(u.dtype, factors.weight.shape[-1])
        return self.device_guard.adapted_norm(
            u, gram, squares, factors, magnitude, floor, cancellation
        )

    def norms(self, squares: Array, factors: Factors, reduce: Reduce | None = None) -> Array:
        """Return ‖Vᵢ‖ by two launches if there is no `reduce`."""
        if reduce is not None:
            return super().norms(squares, factors, reduce)
        floor = self.floor(squares.dtype, factors.weight.shape[-1])
        return self.device_guard.norms(squares, factors, floor)

    def guard(
        self, suspect: Array, norm: Array, factors: Factors, dtype: Any,
        reduce: Reduce | None = None,
    ) -> tuple[Array, Any]:  # fmt: skip
        """Return the norms and the suspect rows. V is not formed if there is no `reduce`."""
        if reduce is not None:
            return super().guard(suspect, norm, factors, dtype, reduce)
        factors = self.device_guard.laid(factors)
        self.device_guard.measure(suspect, norm, factors)
        return norm, self.device_guard.listed(suspect, norm, factors)

    def guarded_times_transposed(
        self, formed: Any, x: Array, factored: Callable[[Array], Array]
    ) -> Array:
        """Return x Vᵀ: `factored`, where the guard overwrites the columns of suspect rows."""
        if not isinstance(formed, Suspects):
            return self.product(x, self.xp.matrix_transpose(formed))
        z = factored(x)
        self.device_guard.outputs(formed, x, z)
        return z

    def guarded_times(
        self, formed: Any, d: Array, low: Array, factored: Callable[[Array], Array], rounded: int
    ) -> Array:
        """Return d V: the guard's part for suspect rows, plus products with the rest of d."""
        if not isinstance(formed, Suspects):
            return self.product(d, formed)
        return self.device_guard.product(formed, d, low, rounded)

    # V, formed

    def row_squares(self, weight: Array, dtype: Any) -> Array:
        """Return ‖wᵢ‖² without an (out, in) temporary. W is read once."""
        return self.patches.squares(Factors(weight, None, None, None), dtype)

    def measures_direction(self, dtype: Any, rank: int) -> bool:
        """Return True for float32 and a small rank: forming V takes as long as reading W."""
        return bool(dtype == np.float32) and rank <= MEASURED

    def direction_squares(self, factors: Factors, dtype: Any) -> Array:
        """Return ‖Vᵢ‖² without an (out, in) temporary. W is read once. `dtype` is float32."""
        return self.patches.squares(factors, dtype)

    def merge(self, factors: Factors, gain: Array, dtype: Any) -> Array:
        """Return W' without an (out, in) temporary. W is read once."""
        return self.patches.merge(factors, gain)

    # Optimizers

    def adamw(
        self, leaves: dict[str, tuple[Array, ...]], rates: dict[str, Any], decays: dict[str, Any],
        numbers: tuple[Any, ...],
    ) -> dict[str, tuple[Array, Array, Array]] | None:  # fmt: skip
        """Return all leaves by one launch, or by two if some are float64.

        Return None if one of the numbers is an array on the device.
        """
        given = (*rates.values(), *decays.values(), *numbers)
        if not all(isinstance(number, float) for number in given):
            return None
        return adamw(self.cuda, self.xp, leaves, rates, decays, numbers)
