"""MXFP4 experts, as gpt-oss has them (quant_method "mxfp4").

::

    P_blocks    U8 (experts, out, in/32, 16), two codes a byte, the low half first
    P_scales    U8 (experts, out, in/32), the byte e of 2^(e - 127)

    W = number(q)·scale, exact in bfloat16

The model has W as (experts, in, out) in memory. That is the shape of the weight here, so its rows
cross the blocks: a block is 32 rows of one column.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from doraxp._base.safetensors import Tensor
from doraxp._base.types import HostArray
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._quantised.codes import (
    bytes_to,
    fp4,
    fp4_pairs,
    halves,
    multiply,
    pack,
    powers,
    rounded,
)
from doraxp.checkpoint._quantised.protocol import Fetch, Found, Quantised, Refused, Settings
from doraxp.checkpoint._safetensors import RAW, Empty

METHOD = "mxfp4"
_BLOCK = 32


def find(tensors: Mapping[str, Tensor], settings: Settings, fetch: Fetch) -> Iterator[Found]:
    """Yield the weights with ``_blocks`` and ``_scales``."""
    if settings.entries.get("quant_method", METHOD) != METHOD:
        return
    for blocks in tensors:
        name = blocks.removesuffix("_blocks")
        scales = f"{name}_scales"
        if name == blocks or scales not in tensors:
            continue
        codes, exponents = tensors[blocks], tensors[scales]
        if (
            (codes.dtype, exponents.dtype) != ("U8", "U8")
            or len(codes.shape) != 4
            or codes.shape != (*exponents.shape, _BLOCK // 2)
            or 0 in codes.shape
        ):
            problem = (
                f"is quantised (MXFP4), but its codes {codes.dtype} of shape {codes.shape} do not "
                f"fit its scales {exponents.dtype} of shape {exponents.shape}"
            )
            yield name, Refused((blocks, scales), problem)
        else:
            experts, out, groups, _ = codes.shape
            shape = (experts, groups * _BLOCK, out)
            yield name, Mxfp4(shape, settings.dtype, (blocks, scales))


@dataclass(frozen=True)
class Mxfp4:
    """Experts in MXFP4."""

    shape: tuple[int, ...]
    dtype: str
    tensors: tuple[str, ...]
    label: str = "MXFP4, groups of 32"

    @property
    def step(self) -> int:
        """The rows of an expert."""
        return self.shape[1]

    def check(self, fetch: Fetch) -> None:
        """Raise CheckpointError where a scale is NaN."""
        name = self.tensors[1]
        if (fetch(name) == 255).any():
            raise CheckpointError(f"{name}: a scale must not be NaN (the byte 255)")

    def dequantise(self, rows: slice, fetch: Fetch, empty: Empty) -> HostArray:
        """Return some rows of the weight."""
        _, height, out = self.shape
        experts = slice(rows.start // height, -(-rows.stop // height))
        codes, scales = (fetch(name, experts) for name in self.tensors)
        result = empty((rows.stop - rows.start, out), RAW[self.dtype])
        for expert in range(experts.start, experts.stop):
            start = max(rows.start - expert * height, 0)
            stop = min(rows.stop - expert * height, height)
            groups = slice(start // _BLOCK, -(-stop // _BLOCK))
            index = expert - experts.start
            columns = _numbers(codes[index, :, groups], scales[index, :, groups])
            first = expert * height + start - rows.start
            inside = slice(start - groups.start * _BLOCK, stop - groups.start * _BLOCK)
            # Numbers of 2 bytes are moved, so they are rounded first.
            numbers = rounded(columns, self.dtype, np.empty)
            result[first : first + stop - start] = numbers[:, inside].T
        return result

    def quantiser(self, fetch: Fetch) -> Mxfp4Quantiser:
        """Return a quantiser with the arithmetic of the OCP specification of MX formats."""
        return Mxfp4Quantiser(self)


def _numbers(codes: HostArray, scales: HostArray) -> HostArray:
    """Return the float32 numbers (out, rows) of codes (out, groups, 16)."""
    values = halves(fp4_pairs(), codes.reshape(len(codes), -1))
    multiply(values, bytes_to(powers(), scales), _BLOCK)
    return values


class Mxfp4Quantiser:
    """Quantises so that the largest number of a block is from 4 to 8; more than 6 becomes 6."""

    passes = 1

    def __init__(self, how: Mxfp4) -> None:
        experts, height, out = how.shape
        self._how = how
        self._scales = np.zeros((experts, out, height // _BLOCK), np.uint8)

    def measure(self, rows: slice, weight: HostArray) -> None:
        """Do nothing: there is one pass."""

    def quantise(self, rows: slice, weight: HostArray) -> Quantised:
        """Return the codes of some experts."""
        _, height, out = self._how.shape
        first = rows.start // height
        count = len(weight) // height
        stored = np.empty((count, out, height // _BLOCK, _BLOCK // 2), np.uint8)
        back = np.empty(weight.shape, np.float32)
        for expert in range(count):
            inside = slice(expert * height, (expert + 1) * height)
            values = np.ascontiguousarray(weight[inside].T, np.float32)
            largest = np.abs(values).reshape(out, -1, _BLOCK).max(axis=-1)
            _, exponent = np.frexp(largest)  # 1 more than the logarithm, rounded down
            scales = np.clip(exponent.astype(np.int64) - 3 + 127, 0, 254)
            self._scales[first + expert] = np.where(largest == 0, 0, scales)
            multiply(values, powers()[254 - scales], _BLOCK)
            stored[expert] = pack(fp4(values, ties_to_even=True), 4).reshape(stored.shape[1:])
            back[inside] = _numbers(stored[expert], self._scales[first + expert]).T
        return Quantised(stored, rounded(back, self._how.dtype, np.empty))

    def rest(self) -> dict[str, HostArray]:
        """Return the scales."""
        return {self._how.tensors[1]: self._scales}
