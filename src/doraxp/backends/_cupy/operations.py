"""The operations on NVIDIA GPUs, through CuPy.

Imports without CuPy and without a GPU. Values are never read on the host.
"""

from __future__ import annotations

import importlib
import importlib.util

import numpy as np

from doraxp._base.types import AdamWLeaf, AdamWNumbers, Consumed, DType, Namespace, Reduce
from doraxp.backends._cupy.adamw import adamw
from doraxp.backends._cupy.arrays import LOW, DeviceArray, PlainWeight, name_of, packed
from doraxp.backends._cupy.device import Cuda
from doraxp.backends._cupy.direction import DevicePatched
from doraxp.backends._cupy.guard import Guard
from doraxp.backends._cupy.passes import Passes
from doraxp.backends._cupy.patches import Patches
from doraxp.backends._cupy.products import Products
from doraxp.backends._direction import Direction, Factors
from doraxp.backends._generic import CANCELLATION, Norm, Operations, OutputGradients, least_sum

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

    def __init__(self, xp: Namespace, cuda: Cuda | None = None) -> None:
        super().__init__(xp)
        self.cuda = cuda or Cuda()
        self.products = Products(xp, self.cuda)
        self.passes = Passes(xp, self.cuda, self.products)
        self.device_guard = Guard(xp, self.cuda, self.products)
        self.patches = Patches(xp, self.cuda, self.products)

    def can_read_values(self, array: DeviceArray) -> bool:
        """Return False: reading a value waits for the whole queue."""
        return False

    def check_device(self, name: str, array: DeviceArray) -> None:
        """Refuse an array that is not on the current device, where the kernels run."""
        number = self.cuda.device()
        if array.device.id != number:
            raise ValueError(
                f"{name} is on CUDA device {array.device.id}, but the current one is {number}: "
                f"use `with cupy.cuda.Device({array.device.id}):`"
            )

    def operand_dtype(self, array: DeviceArray, weight: DeviceArray, dtype: DType) -> DType:
        """Return the own dtype of an x or dy of 16 bits like W: tensor cores take them as is."""
        own = name_of(array)
        low = own in LOW and own == name_of(weight) and np.dtype(dtype) == np.float32
        return array.dtype if low else dtype

    # Products

    def product(self, left: DeviceArray, right: DeviceArray) -> DeviceArray:
        """Return left right, without a cast of either, and by one launch for one token."""
        return self.products.product(left, right)

    def accumulate(self, total: Consumed, left: DeviceArray, right: DeviceArray) -> DeviceArray:
        """Return total ← total + left right: BLAS adds while it multiplies."""
        return self.products.multiply(left, right, total.dtype, out=total, beta=1.0)

    # Before and after the products with V

    def forward_epilogue(
        self, z: Consumed, row_scale: DeviceArray | None,
        update: tuple[DeviceArray, DeviceArray] | None, gain: DeviceArray, bias: DeviceArray | None,
    ) -> tuple[DeviceArray, DeviceArray]:  # fmt: skip
        """Return z and y by one pass."""
        return self.passes.outputs(packed(z, self.xp), row_scale, update, gain, bias, gain.dtype)

    def output_gradients(
        self, d: DeviceArray, z: DeviceArray, gain: DeviceArray, norm: DeviceArray,
        scaled_b: DeviceArray, *, exact: bool, with_bias: bool,
    ) -> OutputGradients:  # fmt: skip
        """Return dz and the sums over tokens by one pass over d and z, into room for the rows.

        One launch writes dm, p and the rows, and one product makes all of `rows_b`.
        """
        rank = scaled_b.shape[-1] if exact else 0
        rows, e, dbias = self.passes.gradients(d, z, gain, rank, total=with_bias)
        p = None
        if exact:
            dm, p = self.passes.norm_rows(rows, d.shape[-2], e, gain, norm, scaled_b)
        else:
            dm = self.over_norm(e, norm)
        return OutputGradients(rows, self.products.product(rows, scaled_b), dm, p, dbias)

    def lora_b_gradient(
        self, dz: DeviceArray, low: DeviceArray, p: DeviceArray | None,
        unit_projection: DeviceArray, scaling: float,
    ) -> DeviceArray:  # fmt: skip
        """Return dB by a product and one launch."""
        db = self.product(self.xp.matrix_transpose(dz), low)
        if p is not None:
            return self.passes.turning(db, p, unit_projection, scaling)
        db *= scaling
        return db

    def over_norm(self, values: DeviceArray, norm: DeviceArray) -> DeviceArray:
        """Return values / n by one launch."""
        return self.passes.over_norm(values, norm)

    # The norm

    def row_squares(self, weight: DeviceArray, dtype: DType) -> DeviceArray:
        """Return ‖wᵢ‖² without an (out, in) temporary. W is read once."""
        return self.patches.squares(PlainWeight(weight), dtype)

    def row_norms(
        self, weight: DeviceArray, squares: DeviceArray, reduce: Reduce | None = None
    ) -> DeviceArray:
        """Return ‖wᵢ‖ by one launch if there is no `reduce`."""
        if reduce is not None:
            return super().row_norms(weight, squares, reduce)
        return self.patches.norms(PlainWeight(weight), squares)[0]

    def norm_and_direction(
        self, u: DeviceArray, gram: DeviceArray, squares: DeviceArray, factors: Factors,
        magnitude: DeviceArray, reduce: Reduce | None = None,
    ) -> Norm:  # fmt: skip
        """Return n, g, V Aᵀ / n and V, by four launches if there is no `reduce`."""
        if reduce is not None:
            return super().norm_and_direction(u, gram, squares, factors, magnitude, reduce)
        least = least_sum(u.dtype, factors.weight.shape[-1], xp=self.xp)
        norm, gain, unit, suspects = self.device_guard.adapted_norm(
            u, gram, squares, factors, magnitude, least, CANCELLATION
        )
        direction = DevicePatched(factors, suspects, self.device_guard, self.passes)
        return Norm(norm, gain, unit, direction)

    # Merging

    def merge(self, direction: Direction, gain: DeviceArray) -> DeviceArray:
        """Return W' without an (out, in) temporary. W is read once."""
        return self.patches.merge(direction.factors, gain)

    def merge_and_measure(self, factors: Factors, magnitude: DeviceArray) -> DeviceArray:
        """Return W' without an (out, in) temporary. W is read once for n, and once to merge.

        n is measured on V for float32 and a small rank: there, forming V costs no more than
        reading W. Else n is expanded.
        """
        kind, rank = magnitude.dtype, factors.lora_a.shape[-2]
        if kind != np.float32 or rank > MEASURED:
            return super().merge_and_measure(factors, magnitude)
        return self.patches.measure_and_merge(factors, magnitude)

    # Optimizers

    def adamw(
        self, leaves: dict[str, AdamWLeaf], rates: dict[str, float | DeviceArray],
        decays: dict[str, float | DeviceArray], numbers: AdamWNumbers,
    ) -> dict[str, tuple[DeviceArray, DeviceArray, DeviceArray]]:  # fmt: skip
        """Return all leaves by one launch, or by two if some are float64."""
        given = (*rates.values(), *decays.values(), *numbers)
        if not all(isinstance(number, float) for number in given):
            return super().adamw(leaves, rates, decays, numbers)  # a number is on the device
        return adamw(self.cuda, self.xp, leaves, rates, decays, numbers)
