"""compressed-tensors: FP8, INT8 and packed INT4 or INT8, as llm-compressor writes them.

::

    float-quantized   P.weight              F8_E4M3 (rows, columns)
    int-quantized     P.weight              I8 (rows, columns)
    pack-quantized    P.weight_packed       I32 (rows, words), b bits a code, q + 2^(b-1), low first
                      P.weight_shape        I64, the shape of the weight
                      P.weight_scale        a tensor, a row, a group of columns or a block
                      P.weight_zero_point   as the scales: I8, or I32 packed along the rows

    W = (q - zero point)·scale    rounded once to the dtype of the scales
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from doraxp._base.safetensors import Tensor
from doraxp._base.types import HostArray
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._quantised.blocks import Blocks
from doraxp.checkpoint._quantised.codes import (
    by_group,
    byte_table,
    bytes_to,
    fp8_numbers,
    halves,
    multiply,
    pairs,
    rounded,
)
from doraxp.checkpoint._quantised.compressed_tensors_quantiser import Quantiser
from doraxp.checkpoint._quantised.protocol import (
    Fetch,
    Found,
    Packed,
    Refused,
    Settings,
    UnfitError,
)
from doraxp.checkpoint._quantised.refused import ADVICE
from doraxp.checkpoint._safetensors import Empty

SCALE = ".weight_scale"
METHOD = "compressed-tensors"
_FLOATS = ("F32", "BF16", "F16")
_BITS = (4, 8)


def find(tensors: Mapping[str, Tensor], settings: Settings, fetch: Fetch) -> Iterator[Found]:
    """Yield the weights whose scales have the suffix ``weight_scale``, in the three formats."""
    if settings.entries.get("quant_method", METHOD) != METHOD:
        return
    for name in tensors:
        module = name.removesuffix(SCALE)
        packed = tensors.get(f"{module}.weight_packed")
        main = packed or tensors.get(f"{module}.weight")
        if module == name or main is None or f"{module}.weight_global_scale" in tensors:
            continue
        if main.dtype not in (("I32",) if packed else ("F8_E4M3", "I8")):
            continue
        there = tuple(
            one
            for suffix in ("weight_packed", "weight", "weight_scale", "weight_zero_point",
                           "weight_shape", "weight_g_idx")
            if (one := f"{module}.{suffix}") in tensors
        )  # fmt: skip
        try:
            yield f"{module}.weight", _how(module, there, tensors, settings, fetch)
        except UnfitError as error:
            yield f"{module}.weight", Refused(there, f"is quantised ({METHOD}), but {error}")


def _how(
    module: str,
    there: tuple[str, ...],
    tensors: Mapping[str, Tensor],
    settings: Settings,
    fetch: Fetch,
) -> Weight:
    """Return how a weight is stored, and raise UnfitError where its tensors do not fit."""
    main, scale = tensors[there[0]], tensors[f"{module}{SCALE}"]
    zero = tensors.get(f"{module}.weight_zero_point")
    if f"{module}.weight_g_idx" in tensors:
        raise UnfitError(
            f"its columns are in the order of their activations (actorder), so it {ADVICE}"
        )
    if len(main.shape) != 2:
        raise UnfitError(f"{there[0]} has the shape {main.shape} and must have two axes")
    if scale.dtype not in _FLOATS:
        raise UnfitError(f"its scales have the dtype {scale.dtype}")
    shape, kind = main.shape, "FP8" if main.dtype == "F8_E4M3" else "INT8"
    if main.dtype == "I32":
        shape, bits = _unpacked(module, main, tensors, fetch)
        kind = f"INT{bits}"
    if 0 in shape:
        raise UnfitError(f"its shape is {shape}")
    blocks = Blocks(shape, _size(shape, scale.shape, settings))
    if zero is not None:
        grid = blocks.grid
        right = {"I32": ("I32", (-(-grid[0] * _BITS_OF[kind] // 32), grid[1]))}
        if (zero.dtype, zero.shape) != right.get(main.dtype, ("I8", scale.shape)) or kind == "FP8":
            raise UnfitError(f"its zero points are {zero.dtype} of shape {zero.shape}")
    return Weight(there, kind, blocks, main, scale, zero)


_BITS_OF = {"INT4": 4, "INT8": 8, "FP8": 8}


def _unpacked(
    module: str, main: Tensor, tensors: Mapping[str, Tensor], fetch: Fetch
) -> tuple[tuple[int, int], int]:
    """Return the shape of a packed weight and the bits of its codes."""
    name = f"{module}.weight_shape"
    entry = tensors.get(name)
    if entry is None or entry.dtype not in ("I64", "I32") or entry.shape != (2,):
        raise UnfitError(f"{name} is missing or does not have two whole numbers")
    rows, columns = (int(side) for side in fetch(name))
    fitting = [bits for bits in range(1, 9) if -(-columns * bits // 32) == main.shape[1]]
    both = [bits for bits in _BITS if bits in fitting]
    if rows != main.shape[0] or columns < 1 or not fitting:
        raise UnfitError(
            f"{name} is {(rows, columns)}, and codes of the shape {main.shape} do not fit it"
        )
    if len(both) != 1:
        raise UnfitError(f"its codes have {fitting[0]} bits, and only 4 and 8 are known here")
    return (rows, columns), both[0]


def _size(shape: tuple[int, ...], grid: tuple[int, ...], settings: Settings) -> tuple[int, int]:
    """Return the block of a weight whose scales have the shape `grid`."""
    rows, columns = shape
    if grid in ((), (1,), (1, 1)):
        return rows, columns
    if len(grid) == 2 and grid[0] == rows and grid[1] > 0:
        if columns % grid[1]:
            raise UnfitError(f"{grid[1]} groups do not divide its {columns} columns")
        return 1, columns // grid[1]
    declared = _declared(settings)
    sizes = {size for size in declared if Blocks(shape, size).grid == grid}
    if not declared and len(grid) == 2 and grid[0] and grid[1]:
        # Without config.json a block is clear where it is a power of 2 that divides the side.
        size = rows // grid[0], columns // grid[1]
        if Blocks(shape, (max(size[0], 1), max(size[1], 1))).grid == grid and all(
            side % one == 0 and one & (one - 1) == 0 for side, one in zip(shape, size, strict=True)
        ):
            return size
        if not settings.entries:
            raise UnfitError(
                "its file does not tell the size of a block: give the folder with its config.json"
            )
    if len(sizes) != 1:
        raise UnfitError(f"its scales have the shape {grid}, which fits no block in config.json")
    return sizes.pop()


def _declared(settings: Settings) -> set[tuple[int, int]]:
    """Return the sizes of blocks that config.json declares; other words are left out."""
    groups = settings.entries.get("config_groups")
    found = set()
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        size = weights.get("block_structure") if isinstance(weights, dict) else None
        if not (isinstance(size, list) and len(size) == 2):
            continue
        if all(type(side) is int and 0 < side < 1 << 32 for side in size):
            found.add((size[0], size[1]))
    return found


@dataclass(frozen=True)
class Weight:
    """A weight of compressed-tensors."""

    tensors: tuple[str, ...]
    kind: str
    """FP8, INT8 or INT4."""
    blocks: Blocks
    main: Tensor
    scale: Tensor
    zero: Tensor | None

    @property
    def label(self) -> str:
        """The format and its groups."""
        zero = " zero" if self.zero else ""
        return f"CT {self.kind} {self.blocks.words()}{zero}"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.blocks.shape

    @property
    def dtype(self) -> str:
        """The dtype of the scales."""
        return self.scale.dtype

    @property
    def step(self) -> int:
        """The rows of a block."""
        return self.blocks.step

    @property
    def resolution(self) -> float:
        """Half a step, with a tenth for the rounding of the scale; zero points are rounded too."""
        if self.kind == "FP8":
            return 2.0**-4
        return (2.2 if self.zero else 1.1) / ((1 << self.bits) - 1)

    @property
    def bits(self) -> int:
        """The bits of a code."""
        return _BITS_OF[self.kind]

    @property
    def is_packed(self) -> bool:
        """Whether codes are packed in words of 32 bits."""
        return self.main.dtype == "I32"

    def name(self, suffix: str) -> str:
        """Return the full name of a tensor beside the main one."""
        return f"{self.tensors[0].removesuffix('_packed')}_{suffix}"

    def check(self, fetch: Fetch) -> None:
        """Raise CheckpointError unless all scales are finite."""
        name = self.name("scale")
        if not np.isfinite(fetch(name).astype(np.float32)).all():
            raise CheckpointError(f"{name}: the scales must be finite")

    def dequantise(self, rows: slice, fetch: Fetch, empty: Empty) -> HostArray:
        """Return some rows of the weight."""
        grid, part = self.blocks.grid, self.blocks.part(rows)
        is_split = len(self.scale.shape) == 2 and self.scale.shape[0] > 1
        scales = fetch(self.name("scale"), part if is_split else None)
        zero = None
        if self.zero is not None and self.is_packed:
            each = 32 // self.bits
            words = slice(part.start // each, -(-part.stop // each))
            unpacked = self._unpack(fetch(self.name("zero_point"), words).T)
            zero = unpacked[:, part.start - words.start * each :][:, : part.stop - part.start].T
        elif self.zero is not None:
            zero = fetch(self.name("zero_point"), part if is_split else None)
            zero = zero.astype(np.float32).reshape(-1, grid[1])
        codes = fetch(self.tensors[0], rows)
        return self.product(codes, scales.reshape(-1, grid[1]), zero, rows, empty)

    def product(
        self,
        codes: HostArray,
        scales: HostArray,
        zero: HostArray | None,
        rows: slice,
        empty: Empty,
    ) -> HostArray:
        """Return some rows from their codes, and the scales and zero points of their lines."""
        values, width = self._numbers(codes), self.blocks.size[1]
        lines = self.blocks.lines(rows) - self.blocks.part(rows).start
        if zero is not None:
            by_group(np.subtract, values, zero[lines], width)
        multiply(values, scales.astype(np.float32)[lines], width)
        return rounded(values, self.dtype, empty)

    def _numbers(self, codes: HostArray) -> HostArray:
        """Return codes as float32 numbers."""
        if self.kind == "FP8":
            return bytes_to(fp8_numbers(), codes)
        return self._unpack(codes)[:, : self.shape[1]] if self.is_packed else codes.astype("f4")

    def _unpack(self, words: HostArray) -> HostArray:
        """Return the numbers in rows of words, float32."""
        packed = np.ascontiguousarray(words).view(np.uint8)
        if self.bits == 4:
            return halves(pairs(np.arange(16) - 8, high_first=False), packed)
        return bytes_to(np.arange(-128, 128).astype(np.float32), packed)

    def pack(self, codes: HostArray) -> HostArray:
        """Return rows of words for rows of codes, int8."""
        each = 32 // self.bits
        columns = -(-codes.shape[1] // each) * each
        padded = np.zeros((len(codes), columns), np.uint8)
        padded[:, : codes.shape[1]] = codes.view(np.uint8) + np.uint8(1 << self.bits - 1)
        if self.bits == 4:
            padded = padded[:, ::2] | padded[:, 1::2] << 4
        return padded.view(np.int32)

    def packed(self, fetch: Fetch) -> Packed:
        """Return the codes, and scales and zero points of each block; −zero · scale is the bias."""
        scales = fetch(self.name("scale")).astype(np.float32).reshape(self.blocks.grid)
        bias = None
        if self.zero is not None:
            zero = fetch(self.name("zero_point"))
            if self.is_packed:
                zero = self._unpack(zero.T)[:, : self.blocks.grid[0]].T
            bias = -zero.astype(np.float32).reshape(scales.shape) * scales
        codes = fetch(self.tensors[0])
        if self.kind == "FP8":
            return Packed(codes, fp8_numbers()[:, None], scales, self.blocks.size, bias)
        if not self.is_packed:
            table = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32)[:, None]
            return Packed(codes.view(np.uint8), table, scales, self.blocks.size, bias)
        octets = np.ascontiguousarray(codes).view(np.uint8)
        each = 8 // self.bits
        if self.shape[1] % each:
            raise CheckpointError(f"{self.tensors[0]}: the last byte of a row is not full")
        numbers = np.arange(1 << self.bits) - (1 << self.bits - 1)
        table = byte_table(numbers, self.bits)
        return Packed(octets[:, : self.shape[1] // each], table, scales, self.blocks.size, bias)

    def quantiser(self, fetch: Fetch) -> Quantiser:
        """Return a quantiser with the arithmetic of compressed-tensors."""
        return Quantiser(self)
