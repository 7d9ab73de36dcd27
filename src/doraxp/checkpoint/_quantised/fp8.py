"""FP8 with a scale for each block of the matrix, as DeepSeek-V3 has it (quant_method "fp8").

::

    NAME              F8_E4M3 (*stack, rows, columns)   the codes q
    NAME_scale_inv    F32, BF16, F16 or ue8m0           the scale of each block, (*stack, grid)

    W = q·scale, a float32 product that is rounded once to the model's dtype

The scale is a factor, in spite of its name. A ue8m0 scale is the byte e of 2^(e - 127). The last
block of a side is smaller where the block does not divide the side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from doraxp._base.safetensors import Tensor
from doraxp._base.types import HostArray
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._quantised.blocks import Blocks
from doraxp.checkpoint._quantised.codes import (
    FP8_MAX,
    bytes_to,
    flat_rows,
    fp8,
    fp8_numbers,
    multiply,
    powers,
    rounded,
)
from doraxp.checkpoint._quantised.protocol import Fetch, Found, Packed, Quantised, Refused, Settings
from doraxp.checkpoint._quantised.refused import ADVICE
from doraxp.checkpoint._safetensors import RAW, Empty

SUFFIX = "_scale_inv"
_POWERS = ("F8_E8M0", "U8")
_FLOATS = ("F32", "BF16", "F16")
_NO_SETTINGS = (
    "is quantised (FP8) in blocks of a size that its file does not tell: give the folder with its "
    "config.json"
)


def find(tensors: Mapping[str, Tensor], settings: Settings, fetch: Fetch) -> Iterator[Found]:
    """Yield the weights whose scales have the suffix ``_scale_inv``."""
    for scale in tensors:
        name = scale.removesuffix(SUFFIX)
        if name != scale and name in tensors:
            yield name, _how(name, scale, tensors, settings)


def _how(name: str, scale: str, tensors: Mapping[str, Tensor], settings: Settings) -> Fp8 | Refused:
    """Return how a weight is stored."""
    both, weight, entry = (name, scale), tensors[name], tensors[scale]
    if weight.dtype != "F8_E4M3" or len(weight.shape) < 2 or 0 in weight.shape:
        kind = f"{weight.dtype} of shape {weight.shape} with the scales of FP8"
        if weight.dtype in ("I8", "U8"):
            kind = "FP4, two codes a byte"
        return Refused(both, f"is quantised ({kind}) and {ADVICE}")
    if entry.dtype not in _POWERS + _FLOATS:
        return Refused(both, f"is quantised (FP8), but its scales have the dtype {entry.dtype}")
    rows, columns = weight.shape[-2:]
    words = settings.entries
    if "weight_block_size" in words or words.get("quant_method") == "fp8":
        block = _declared(words.get("weight_block_size", [128, 128]), rows, columns)
        if block is None:
            return Refused(
                both, "is quantised (FP8), but weight_block_size in config.json is not two sizes"
            )
    else:
        block = _derived(entry.shape, rows, columns)
        if block is None:
            return Refused(both, _NO_SETTINGS)
    blocks = Blocks(weight.shape, block)
    is_one = len(weight.shape) == 2 and blocks.grid == (1, 1) and entry.shape in ((), (1,))
    if entry.shape != blocks.grid and not is_one:
        return Refused(
            both,
            f"is quantised (FP8), but its scales have the shape {entry.shape}, and blocks of "
            f"{block[0]} × {block[1]} need {blocks.grid}",
        )
    return Fp8(settings.dtype, both, blocks, entry)


def _declared(value: object, rows: int, columns: int) -> tuple[int, int] | None:
    """Return the block that config.json declares; None where its words are not a block."""
    if value is None:
        return rows, columns
    if not (isinstance(value, list) and len(value) == 2):
        return None
    if not all(type(size) is int and 0 < size < 1 << 32 for size in value):
        return None
    return value[0], value[1]


def _derived(grid: tuple[int, ...], rows: int, columns: int) -> tuple[int, int] | None:
    """Return the only likely block of a grid of scales; None where there may be others.

    A side of one block is clear, and so is a side that is divided into blocks whose size is a power
    of 2.
    """
    if len(grid) < 2:
        return rows, columns
    block = []
    for side, parts in zip((rows, columns), grid[-2:], strict=True):
        if parts < 1 or side % parts:
            return None
        size = side // parts
        if parts > 1 and size & (size - 1):
            return None
        block.append(size)
    return block[0], block[1]


@dataclass(frozen=True)
class Fp8:
    """A weight in FP8 with a scale for each block."""

    dtype: str
    tensors: tuple[str, ...]
    blocks: Blocks
    scale: Tensor
    """The entry of the scales."""

    @property
    def label(self) -> str:
        """The format and its blocks."""
        return f"FP8 {self.blocks.words()}"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.blocks.shape

    @property
    def step(self) -> int:
        """The rows of a block; of a stack, those of one entry along its first axis."""
        return self.blocks.step

    @property
    def resolution(self) -> float:
        """Half the distance of two numbers with three bits after the point."""
        return 2.0**-4

    def check(self, fetch: Fetch) -> None:
        """Raise CheckpointError unless all scales are finite."""
        name = self.tensors[1]
        if not np.isfinite(self._numbers(fetch(name))).all():
            raise CheckpointError(f"{name}: the scales must be finite")

    def dequantise(self, rows: slice, fetch: Fetch, empty: Empty) -> HostArray:
        """Return some rows of the weight."""
        name, scale = self.tensors
        codes = flat_rows(name, self.shape, rows, fetch)
        return self.product(codes, fetch(scale), rows, empty)

    def packed(self, fetch: Fetch) -> Packed:
        """Return the codes, and a scale for each block."""
        codes, scale = (fetch(name) for name in self.tensors)
        table = fp8_numbers()[:, None]
        scales = self._numbers(scale).reshape(self.blocks.grid)
        return Packed(codes, table, scales, self.blocks.size)

    def quantiser(self, fetch: Fetch) -> Fp8Quantiser:
        """Return a quantiser with the arithmetic of transformers."""
        return Fp8Quantiser(self)

    def product(self, codes: HostArray, stored: HostArray, rows: slice, empty: Empty) -> HostArray:
        """Return some rows from their codes and all scales as they are stored."""
        values = bytes_to(fp8_numbers(), codes)
        scales = self._numbers(stored).reshape(-1, self.blocks.grid[-1])
        multiply(values, scales[self.blocks.lines(rows)], self.blocks.size[1])
        return rounded(values, self.dtype, empty)

    def _numbers(self, stored: HostArray) -> HostArray:
        """Return scales in float32."""
        if self.scale.dtype in _POWERS:
            return bytes_to(powers(), stored)
        return stored.astype(np.float32)


class Fp8Quantiser:
    """Quantises to FP8: the largest number of each block becomes 448."""

    def __init__(self, how: Fp8) -> None:
        self._how = how
        self.passes, grid = how.blocks.passes, how.blocks.grid
        self._largest = np.zeros((math.prod(grid[:-1]), grid[-1]), np.float32)
        self._stored = np.zeros(how.scale.shape, RAW[how.scale.dtype])

    def measure(self, rows: slice, weight: HostArray) -> None:
        """Take the largest numbers of the blocks."""
        values = np.abs(weight.astype(np.float32, copy=False))
        part = self._largest[self._how.blocks.part(rows)]
        np.maximum(part, self._how.blocks.reduced(np.maximum, values, rows), out=part)

    def quantise(self, rows: slice, weight: HostArray) -> Quantised:
        """Return the codes of some rows."""
        how, blocks = self._how, self._how.blocks
        if self.passes == 1:
            self.measure(rows, weight)
        part = blocks.part(rows)
        factors, stored = _factors(self._largest[part], how.scale.dtype)
        self._stored.reshape(self._largest.shape)[part] = stored
        scaled = weight.astype(np.float32)
        multiply(scaled, factors[blocks.lines(rows) - part.start], blocks.size[1])
        codes = fp8(scaled)
        back = how.product(codes, self._stored, rows, np.empty)
        return Quantised(codes, back)

    def rest(self) -> dict[str, HostArray]:
        """Return the scales."""
        return {self._how.tensors[1]: self._stored}


def _factors(largest: HostArray, dtype: str) -> tuple[HostArray, HostArray]:
    """Return the factors that give the codes, and the scales as they are stored.

    A block of zeros has the scale 1. Scales that are stored in fewer than 32 bits are rounded
    first, so that the codes are the nearest ones for the scales on disk.
    """
    one, limit = np.float32(1), np.float32(FP8_MAX)
    is_zero = largest == 0
    with np.errstate(over="ignore"):  # of blocks below 1e-36: infinity, as in transformers
        # PyTorch divides a number by an array in these two steps.
        factors = np.where(is_zero, one, one / np.where(is_zero, one, largest) * limit)
    scales = one / factors
    if dtype in _POWERS:
        tiny = np.finfo(np.float32).tiny
        logarithm = np.log2(np.maximum(scales, tiny), dtype=np.float64).astype(np.float32)
        exponents = np.ceil(logarithm).astype(np.int32)
        return np.ldexp(one, -exponents), (exponents + 127).astype(np.uint8)
    stored = scales.astype(RAW[dtype])
    if dtype != "F32":
        factors = one / stored.astype(np.float32)
    return factors, stored
