"""The rows of a packed weight on NVIDIA GPUs, by one launch."""

from __future__ import annotations

from doraxp._base.types import Namespace
from doraxp.backends._cupy.arrays import DeviceArray, packed, typed
from doraxp.backends._cupy.device import Cuda
from doraxp.backends._cupy.signatures import Unpack
from doraxp.backends._cupy.source import THREADS, blocks
from doraxp.backends._packed import Packed

UNPACK_RUN = 4
"""How often a thread of `unpack` takes 16 bytes of W. kernels/unpack.cu has the same."""


def unpack(
    cuda: Cuda, xp: Namespace, weight: Packed, rows: slice, buffer: DeviceArray | None
) -> DeviceArray:
    """Return some rows of a packed weight of float32 or 16 bits, (k, in), in `buffer` if given."""
    inner, count = weight.shape[1], rows.stop - rows.start
    if buffer is None:
        buffer = cuda.empty((count, inner), weight.dtype)
    result = buffer[:count]
    if count == 0:
        return result
    codes, table, scale, bias = (packed(array, xp) for array in weight[:4])
    if isinstance(weight.block, tuple):
        (height, width), across = weight.block, scale.shape[1]
    else:
        height, width, across = 1, weight.block, 0
    arguments = Unpack(
        codes=codes, table=table, scale=scale, bias=bias, result=result, first=rows.start * inner,
        size=result.size, inner=inner, shift=table.shape[1].bit_length() - 1, height=height,
        width=width, across=across,
    )  # fmt: skip
    types, each = typed(weight.dtype, "float32", "float32"), 16 // result.itemsize
    cuda.launch(arguments, types, (blocks(result.size, UNPACK_RUN * each * THREADS), 1, 1))
    return result
