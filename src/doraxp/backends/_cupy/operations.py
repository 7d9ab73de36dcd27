"""The operations on NVIDIA GPUs, through CuPy.

Imports without CuPy and without a GPU. Values are never read on the host.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence

import numpy as np

from doraxp._base.extras import install_hint
from doraxp._base.types import (
    AdamWLeaves,
    AdamWNumbers,
    AdamWStepped,
    Adapter,
    DType,
    Namespace,
    Reduce,
    RowWeight,
)
from doraxp.backends._cupy.adamw import adamw
from doraxp.backends._cupy.arrays import LOW, DeviceArray, dtype_name, name_of
from doraxp.backends._cupy.backward import Backward
from doraxp.backends._cupy.device import Cuda
from doraxp.backends._cupy.direction import DevicePatched
from doraxp.backends._cupy.layers import CupyLayerOperations
from doraxp.backends._cupy.passes import Passes
from doraxp.backends._cupy.patches import Patches
from doraxp.backends._cupy.products import Products
from doraxp.backends._cupy.skinny import Skinny
from doraxp.backends._cupy.suspects import Suspects, laid
from doraxp.backends._cupy.unpack import unpack
from doraxp.backends._direction import Direction, Factors
from doraxp.backends._dtypes import as_dtype, transpose
from doraxp.backends._generic import CANCELLATION, LayerGradients, Norm, Operations, least_sum
from doraxp.backends._packed import Packed
from doraxp.backends._precision import is_exact

MEASURED = 64
"""The largest rank for which forming V takes no longer than reading W a second time."""
NORMED = 64
"""The largest rank for which one launch makes s B and A Aᵀ, and another n. Beyond, products do: a
block of `prepare_adapter` reads 8 rows of A for 16 numbers of A Aᵀ."""
ROW_BYTES = 1 << 25
"""Bytes of a block of rows of a weight that is given by rows."""
NEEDED = 80
"""Ten times the compute capability that the kernels need. It is the first with bfloat16."""


def why_not() -> str | None:
    """Return the reason why CuPy cannot run here, or None if it can."""
    if importlib.util.find_spec("cupy") is None:
        how = install_hint("cuda13")
        return f"not installed: {how}; for a driver of CUDA 12, the extra is cuda12"
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


class CupyOperations(CupyLayerOperations, Operations):
    """The operations on CuPy arrays: products, passes, and patches of V, on one GPU."""

    def __init__(self, xp: Namespace, cuda: Cuda | None = None) -> None:
        super().__init__(xp)
        self.cuda = cuda or Cuda()
        self.skinny = Skinny(xp, self.cuda)
        self.products = Products(xp, self.cuda, self.skinny)
        self.passes = Passes(xp, self.cuda)
        self.backward = Backward(xp, self.products, self.passes, self.skinny)
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

    def operand_dtype(
        self, array: DeviceArray, weight: DeviceArray, dtype: DType, *, masked: bool = False,
        z: DType | None = None,
    ) -> DType:  # fmt: skip
        """Return the own dtype of an x or dy of 16 bits like W: tensor cores take them as is."""
        own = array.dtype
        low = own == weight.dtype and dtype_name(own) in LOW and dtype == np.float32
        exact = is_exact() if z is None else z == dtype
        return own if low and not (masked and exact) else dtype

    # Products

    def product(self, left: DeviceArray, right: DeviceArray) -> DeviceArray:
        """Return left right, by one launch for one token.

        Casts a factor only beside float64, and a float16 one beside more than 1024 rows of float32.
        """
        return self.products.product(left, right)

    def accumulate(self, total: DeviceArray, left: DeviceArray, right: DeviceArray) -> DeviceArray:
        """Return total ← total + left right: BLAS adds while it multiplies.

        It writes only to arrays in C order, which the columns of a wider array are not.
        """
        if not total.flags.c_contiguous:
            return total + self.products.product(left, right)
        return self.products.multiply(left, right, total.dtype, out=total, beta=1.0)

    def block_size(self, weight: RowWeight, tokens: int) -> int:
        """Return the numbers of 32 MiB: each block takes the launches of a step."""
        return ROW_BYTES // int(np.dtype(weight.dtype).itemsize)

    def unpacked(
        self, packed: Packed, rows: slice, buffer: DeviceArray | None = None
    ) -> DeviceArray:
        """Return some rows of a packed weight by one launch, in `buffer`."""
        if np.dtype(packed.dtype) == np.float64:
            return super().unpacked(packed, rows)
        return unpack(self.cuda, self.xp, packed, rows, buffer)

    def gradients(
        self, d: DeviceArray, x: DeviceArray, low: DeviceArray, z: DeviceArray, norm: Norm,
        scaling: float, dtype: DType, *, exact: bool, with_bias: bool, round_later: bool,
    ) -> LayerGradients:  # fmt: skip
        """Return dz V, dA, dB and dm; with 16-bit x, dy and W, dz is rounded for dz V alone."""
        how = {"exact": exact, "with_bias": with_bias, "round_later": round_later}
        if not isinstance(norm.direction, DevicePatched):  # V is stored: the input axis is split
            d, x, z = (self.xp.astype(each, low.dtype, copy=False) for each in (d, x, z))
            return super().gradients(d, x, low, z, norm, scaling, dtype, **how)
        return self.backward.gradients(d, x, low, z, norm, norm.direction, scaling, dtype, **how)

    def over_norm(self, values: DeviceArray, norm: DeviceArray) -> DeviceArray:
        """Return values / n by one launch."""
        return self.passes.over_norm(values, norm)

    # The norm

    def row_squares(self, weight: DeviceArray, dtype: DType) -> DeviceArray:
        """Return ‖wᵢ‖² without an (out, in) temporary. W is read once."""
        return self.patches.squares(weight, dtype)

    def row_norms(
        self, weight: DeviceArray, squares: DeviceArray, reduce: Reduce | None = None
    ) -> DeviceArray:
        """Return ‖wᵢ‖ by one launch if there is no `reduce`."""
        if reduce is not None:
            return super().row_norms(weight, squares, reduce)
        return self.patches.norms(weight, squares)

    def norm_and_direction(
        self, weight: DeviceArray, adapter: Adapter, scaling: float,
        row_scale: DeviceArray | None, squares: DeviceArray,
        products: tuple[DeviceArray, DeviceArray] | None = None, reduce: Reduce | None = None,
    ) -> Norm:  # fmt: skip
        """Return n, g, V Aᵀ / n and V, by few launches if there is no `reduce`."""
        if reduce is not None:
            return super().norm_and_direction(
                weight, adapter, scaling, row_scale, squares, products, reduce
            )
        xp, dtype, rank = self.xp, squares.dtype, adapter.lora_a.shape[-2]
        multiply, whole = self.products.multiply, name_of(weight) in LOW
        few = rank <= NORMED
        a, b, gram, found = self.skinny.prepare(
            adapter.lora_a, adapter.lora_b, scaling, dtype, gram=few
        )
        u = bg = None
        if not self.skinny.makes_u(weight, dtype, rank):
            u = self.product(weight, transpose(a))
        if not few:
            gram = multiply(a, transpose(a), dtype, whole=whole)
            bg = multiply(b, gram, dtype, whole=whole)
        factors = Factors(weight, a, b, row_scale)
        magnitude = as_dtype(adapter.magnitude, dtype, xp=xp)
        least = least_sum(dtype, weight.shape[-1], xp=xp)
        norm, gain, unit, gained, suspect = self.skinny.measure(
            factors, gram, squares, magnitude, found, least, CANCELLATION, u=u, bg=bg
        )
        suspects = Suspects(found, suspect, gained, laid(factors, xp))
        return Norm(norm, gain, unit, DevicePatched(factors, suspects, self.passes, self.products))

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
        self, leaves: AdamWLeaves, rates: Sequence[float | DeviceArray],
        decays: Sequence[float | DeviceArray], numbers: AdamWNumbers, *, donate: bool,
    ) -> AdamWStepped:  # fmt: skip
        """Return p, mu and nu by one launch for up to 36 leaves, and another for float64 leaves.

        With `donate` they are the given arrays, where these are in C order.
        """
        if not set(map(type, (*rates, *decays, *numbers))) <= {float}:  # a number on the device
            return super().adamw(leaves, rates, decays, numbers, donate=donate)
        return adamw(self.cuda, self.xp, leaves, rates, decays, numbers, donate=donate)
