"""The quantiser of compressed-tensors: scales of the least and the largest number of each block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from doraxp._base.types import HostArray
from doraxp.checkpoint._quantised.codes import FP8_MAX, by_group, fp8
from doraxp.checkpoint._quantised.protocol import Quantised
from doraxp.checkpoint._safetensors import RAW

if TYPE_CHECKING:
    from doraxp.checkpoint._quantised.compressed_tensors import Weight

_EPSILON = np.float32(np.finfo(np.float32).eps)
"""The scale of a block of zeros."""


class Quantiser:
    """Quantises with the scales of the least and the largest number of each block."""

    def __init__(self, how: Weight) -> None:
        grid = how.blocks.grid
        self._how, self.passes = how, how.blocks.passes
        self._least, self._largest = np.zeros(grid, np.float32), np.zeros(grid, np.float32)
        self._scales = np.zeros(grid, RAW[how.scale.dtype])
        self._zero = np.zeros(grid, np.int8)

    def measure(self, rows: slice, weight: HostArray) -> None:
        """Take the least and the largest numbers; 0 counts as one of them."""
        blocks, values = self._how.blocks, weight.astype(np.float32, copy=False)
        part = blocks.part(rows)
        for operation, all_lines in ((np.minimum, self._least), (np.maximum, self._largest)):
            lines = all_lines[part]
            operation(lines, blocks.reduced(operation, values, rows), out=lines)

    def quantise(self, rows: slice, weight: HostArray) -> Quantised:
        """Return the codes of some rows."""
        how, blocks = self._how, self._how.blocks
        if self.passes == 1:
            self.measure(rows, weight)
        part, width = blocks.part(rows), blocks.size[1]
        lines = blocks.lines(rows) - part.start
        self._choose(part)
        zero = self._zero[part].astype(np.float32) if how.zero is not None else None
        values, scales = weight.astype(np.float32), self._scales[part]
        by_group(np.divide, values, scales.astype(np.float32)[lines], width)
        if zero is not None:
            by_group(np.add, values, zero[lines], width)
        codes: HostArray
        if how.kind == "FP8":
            codes = fp8(values)
        else:
            limit = 1 << how.bits - 1
            codes = np.rint(np.clip(values, -limit, limit - 1, out=values)).astype(np.int8)
        stored = how.pack(codes) if how.is_packed else codes
        return Quantised(stored, how.product(stored, scales, zero, rows, np.empty))

    def _choose(self, part: slice) -> None:
        """Choose the scales and the zero points of some lines."""
        least, largest = self._least[part], self._largest[part]
        span = np.float32(2 * FP8_MAX if self._how.kind == "FP8" else (1 << self._how.bits) - 1)
        scales: HostArray
        if self._how.zero is None:
            scales = np.maximum(-least, largest) / (span / np.float32(2))
        else:
            scales = (largest - least) / span
            limit = 1 << self._how.bits - 1
            ratio = np.divide(least, scales, where=scales > 0, out=np.zeros_like(least))
            self._zero[part] = np.rint(np.clip(-limit - ratio, -limit, limit - 1))
        self._scales[part] = np.where(scales == 0, _EPSILON, scales)

    def rest(self) -> dict[str, HostArray]:
        """Return the scales and the zero points."""
        how = self._how
        found = {how.name("scale"): self._scales.reshape(how.scale.shape)}
        if how.zero is not None:
            zero = how.pack(self._zero.T).T.copy() if how.is_packed else self._zero
            found[how.name("zero_point")] = zero.reshape(how.zero.shape)
        return found
