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
    mx_scales,
    pack,
    powers,
    rounded,
)
from doraxp.checkpoint._quantised.protocol import Fetch, Found, Packed, Quantised, Refused, Settings
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
    label: str = "MXFP4"

    @property
    def step(self) -> int:
        """The rows of a group."""
        return _BLOCK

    @property
    def resolution(self) -> float:
        """Half the distance from 4 to 6 as a part of 6."""
        return 0.17

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

    def packed(self, fetch: Fetch) -> Packed:
        """Raise CheckpointError: experts are not one matrix."""
        raise CheckpointError(f"{self.tensors[0]}: is a stack of experts, and not a matrix")

    def quantiser(self, fetch: Fetch) -> Mxfp4Quantiser:
        """Return a quantiser with scales as mx.quantize and Triton's kernels choose them."""
        return Mxfp4Quantiser(self)


def _numbers(codes: HostArray, scales: HostArray) -> HostArray:
    """Return the float32 numbers (out, rows) of codes (out, groups, 16)."""
    values = halves(fp4_pairs(), codes.reshape(len(codes), -1))
    multiply(values, bytes_to(powers(), scales), _BLOCK)
    return values


class Mxfp4Quantiser:
    """Quantises with the least powers of 2 with which no number is above 6."""

    passes = 1

    def __init__(self, how: Mxfp4) -> None:
        experts, height, out = how.shape
        self._how = how
        self._codes = np.empty((out, height // _BLOCK, _BLOCK // 2), np.uint8)  # of one expert
        self._scales = np.zeros((experts, out, height // _BLOCK), np.uint8)

    def measure(self, rows: slice, weight: HostArray) -> None:
        """Do nothing: there is one pass."""

    def quantise(self, rows: slice, weight: HostArray) -> Quantised:
        """Return the codes of the experts that these rows complete."""
        height = self._how.shape[1]
        complete = [self._codes[:0]]
        back = np.empty(weight.shape, np.float32)
        for start in range(rows.start // height * height, rows.stop, height):
            first, last = max(start, rows.start), min(start + height, rows.stop)
            groups = slice((first - start) // _BLOCK, (last - start) // _BLOCK)
            values = weight[first - rows.start : last - rows.start].T
            codes, scales = _quantised(np.ascontiguousarray(values, np.float32))
            self._codes[:, groups] = codes
            self._scales[start // height, :, groups] = scales
            back[first - rows.start : last - rows.start] = _numbers(codes, scales).T
            if last == start + height:
                complete.append(self._codes.copy())
        weight = rounded(back, self._how.dtype, np.empty)
        return Quantised(np.concatenate(complete), weight)

    def rest(self) -> dict[str, HostArray]:
        """Return the scales."""
        return {self._how.tensors[1]: self._scales}


def _quantised(values: HostArray) -> tuple[HostArray, HostArray]:
    """Return the codes and the scales of numbers (out, rows), which are overwritten."""
    groups = values.reshape(len(values), -1, _BLOCK)
    scales = mx_scales(np.abs(groups).max(axis=-1), 6)
    multiply(values, powers()[254 - scales], _BLOCK)
    codes = pack(fp4(values, ties_to_even=True), 4).reshape(*groups.shape[:2], _BLOCK // 2)
    return codes, scales.astype(np.uint8)
