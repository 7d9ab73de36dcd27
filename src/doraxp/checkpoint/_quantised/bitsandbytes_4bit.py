"""bitsandbytes in 4 bits, NF4 and FP4: a scale for each block of the flat weight.

::

    NAME                   two codes a byte, the high half first, (bytes, 1)
    NAME.absmax            F32, the scale of each block; or U8, codes of such scales
    NAME.quant_map         F32, the numbers of the 16 codes
    NAME.nested_absmax     of absmax in U8: its scale for each nested block,
    NAME.nested_quant_map  and the numbers of its 256 codes
    NAME.quant_state.…     JSON: the kind, the block, the dtype and the shape

    absmax = map[codes]·nested_absmax + offset     each operation is rounded to nested_dtype
    W = map[code]·absmax                           a float32 product, rounded once to the dtype

A block may cross rows. The storage of the codes may have any dtype: the bytes count.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from doraxp._base.safetensors import Tensor
from doraxp._base.types import HostArray
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._json import JsonObject, parse_json
from doraxp.checkpoint._quantised.bitsandbytes_4bit_quantiser import (
    Bits4Quantiser,
    NestedQuantiser,
    nested_scales,
)
from doraxp.checkpoint._quantised.codes import (
    byte_table,
    check_finite,
    halves,
    multiply,
    pairs,
    rounded,
)
from doraxp.checkpoint._quantised.protocol import (
    Fetch,
    Found,
    Packed,
    Quantisation,
    Refused,
    Settings,
    UnfitError,
)
from doraxp.checkpoint._safetensors import DTYPES, RAW, Empty

STATE = ".quant_state.bitsandbytes__"
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_NF4 = (
    -1, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.091050036, 0,
    0.079580300, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1,
)  # fmt: skip
_FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
_MAPS = {"nf4": np.array(_NF4), "fp4": np.concatenate([_FP4, -_FP4])}
_JSON_LIMIT, _BLOCK_LIMIT, _SIDE_LIMIT = 1 << 16, 1 << 24, 1 << 40
_LARGE = float(np.finfo(np.float32).max)


def find(tensors: Mapping[str, Tensor], settings: Settings, fetch: Fetch) -> Iterator[Found]:
    """Yield the weights with a ``quant_state``."""
    for name in tensors:
        weight, found, kind = name.partition(STATE)
        if found:
            yield weight, _in_4_bits(weight, kind, tensors, fetch)


def _in_4_bits(
    name: str, kind: str, tensors: Mapping[str, Tensor], fetch: Fetch
) -> Quantisation | Refused:
    """Return how a weight is stored in 4 bits."""
    state = f"{name}{STATE}{kind}"
    suffixes = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
    names = [f"{name}{suffix}" for suffix in suffixes]
    there = (*(one for one in names if one in tensors), state)
    try:
        if tensors[state].dtype != "U8" or tensors[state].nbytes > _JSON_LIMIT:
            raise UnfitError(f"{state} is not JSON")
        words = parse_json(bytes(fetch(state).reshape(-1)), Path(state))
        return _fitting(name, kind, words, state, tensors)
    except (UnfitError, CheckpointError) as error:
        return Refused(there, f"is quantised (bitsandbytes, 4 bits), but {error}")


def _fitting(
    name: str, kind: str, words: JsonObject, state: str, tensors: Mapping[str, Tensor]
) -> Bits4:
    """Return how a weight is stored, and raise UnfitError where the tensors do not fit."""

    def entry(suffix: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> Tensor:
        tensor = tensors.get(f"{name}{suffix}")
        if tensor is None:
            raise UnfitError(f"{name}{suffix} is missing")
        if tensor.dtype not in dtypes or tensor.shape != shape:
            raise UnfitError(
                f"{name}{suffix} is {tensor.dtype} of shape {tensor.shape} instead of "
                f"{dtypes[0]} of shape {shape}"
            )
        return tensor

    if kind not in _MAPS or words.get("quant_type") != kind:
        raise UnfitError(f"its kind {words.get('quant_type')!r} is not nf4 or fp4")
    dtype = _DTYPES.get(str(words.get("dtype")))
    block = _size(words.get("blocksize"), _BLOCK_LIMIT)
    sides = words.get("shape")
    if dtype is None or block is None or not isinstance(sides, list) or len(sides) < 2:
        raise UnfitError(f"{state} does not say the dtype, the block and the shape")
    shape = tuple(_size(side, _SIDE_LIMIT) or 0 for side in sides)
    numbers = math.prod(shape)
    main = tensors.get(name)
    if main is None or not numbers or main.dtype not in RAW:
        raise UnfitError(f"{name} is missing or {state} has a wrong shape")
    if main.nbytes != (numbers + 1) // 2 or math.prod(main.shape[1:]) != 1 or not main.shape:
        raise UnfitError(
            f"{name} has {main.nbytes} bytes in the shape {main.shape}, and the weight of shape "
            f"{shape} needs {(numbers + 1) // 2} in a column"
        )
    blocks = -(-numbers // block)
    scales = tensors.get(f"{name}.absmax")
    if scales is not None and len(scales.shape) == 2:
        raise UnfitError(
            f"{name}.absmax has two axes: a program on a CPU has changed it before it saved the "
            "model, so its values are damaged: quantise the original model again"
        )
    entry(".quant_map", ("F32",), (16,))
    names = [name, f"{name}.absmax", f"{name}.quant_map"]
    nested, scales_in = None, "U8"
    if f"{name}.nested_absmax" in tensors:
        entry(".absmax", ("U8",), (blocks,))
        entry(".nested_quant_map", ("F32",), (256,))
        nested = _nested(words, state)
        outer = entry(".nested_absmax", tuple(DTYPES), (-(-blocks // nested.block),))
        nested = nested._replace(stored=outer.dtype)
        names += [f"{name}.nested_absmax", f"{name}.nested_quant_map"]
    else:
        scales_in = entry(".absmax", ("F32", "BF16", "F16"), (blocks,)).dtype
    return Bits4(shape, dtype, (*names, state), kind, block, main, scales_in, nested)


def _size(value: object, limit: int) -> int | None:
    """Return a size from JSON; None unless it is a whole number from 1 to `limit`."""
    return value if type(value) is int and 0 < value <= limit else None


class Nested(NamedTuple):
    """How the scales are quantised in turn."""

    block: int
    dtype: str
    """The dtype in which the scales are computed."""
    offset: float
    stored: str = ""
    """The dtype of their own scales."""


def _nested(words: JsonObject, state: str) -> Nested:
    """Return how the scales are quantised, from the words of the JSON."""
    block = _size(words.get("nested_blocksize"), _BLOCK_LIMIT)
    dtype = _DTYPES.get(str(words.get("nested_dtype")))
    offset = words.get("nested_offset")
    if block is None or dtype is None or type(offset) not in (int, float):
        raise UnfitError(f"{state} does not say how the scales are quantised")
    if not abs(cast(float, offset)) < _LARGE:
        raise UnfitError(f"{state} has an offset that is not finite in float32")
    return Nested(block, dtype, float(cast(float, offset)))


@dataclass(frozen=True)
class Bits4:
    """A weight in 4 bits."""

    shape: tuple[int, ...]
    dtype: str
    tensors: tuple[str, ...]
    kind: str
    block: int
    """The numbers of the flat weight that have one scale."""
    main: Tensor
    """The entry of the codes."""
    scale_dtype: str
    nested: Nested | None

    @property
    def label(self) -> str:
        """The kind of the codes, and the block."""
        return f"{self.kind} {self.block}" + (" nested" if self.nested else "")

    @property
    def size(self) -> int:
        """The numbers of the weight."""
        return math.prod(self.shape)

    @property
    def unit(self) -> int:
        """The numbers of the fewest blocks that fill whole elements of the stored codes."""
        return math.lcm(self.block, 2 * RAW[self.main.dtype].itemsize)

    @property
    def resolution(self) -> float:
        """Half the largest distance of two numbers: 1/6 of fp4, 0.152 of nf4, and its rounding."""
        return 0.17

    @property
    def step(self) -> int:
        """The fewest rows that have whole blocks."""
        return self.unit // math.gcd(self.unit, self.shape[-1])

    def check(self, fetch: Fetch) -> None:
        """Raise CheckpointError unless the scales are finite and the table is that of the kind."""
        name = self.tensors[2]
        # Some readers take the table from the file, others have their own.
        if not np.allclose(fetch(name), _MAPS[self.kind], rtol=0, atol=1e-4):
            raise CheckpointError(f"{name}: must be the table of {self.kind}")
        for tensor in self.tensors[3:5] if self.nested else self.tensors[1:2]:
            check_finite(tensor, fetch)

    def dequantise(self, rows: slice, fetch: Fetch, empty: Empty) -> HostArray:
        """Return some rows of the weight."""
        columns, unit = self.shape[-1], self.unit
        start, stop = rows.start * columns, rows.stop * columns
        first = start // unit * unit  # the numbers that are read fill whole blocks
        last = min(-(-stop // unit) * unit, self.size)
        bytes_each = self.main.nbytes // self.main.shape[0]
        stored = fetch(
            self.tensors[0], slice(first // 2 // bytes_each, -(-last // 2 // bytes_each))
        )
        scales = self._scales(slice(first // self.block, -(-last // self.block)), fetch)
        codes = np.ascontiguousarray(stored).reshape(-1).view(np.uint8)
        values = self.numbers(codes, scales, fetch(self.tensors[2]))
        return rounded(values[start - first : stop - first].reshape(-1, columns), self.dtype, empty)

    def numbers(self, codes: HostArray, scales: HostArray, table: HostArray) -> HostArray:
        """Return the flat float32 numbers of whole blocks, from bytes with two codes."""
        values = halves(pairs(table, high_first=True), codes)
        multiply(values[None], scales[None], self.block)
        return values

    def _scales(self, blocks: slice, fetch: Fetch) -> HostArray:
        """Return the scales of some blocks, float32."""
        name = self.tensors[1]
        if self.nested is None:
            return fetch(name, blocks).astype(np.float32)
        size = self.nested.block
        outer = slice(blocks.start // size, -(-blocks.stop // size))
        absmax = fetch(self.tensors[3], outer).astype(np.float32)
        each = np.repeat(absmax, size)[blocks.start - outer.start * size :]
        codes = fetch(name, blocks)
        return nested_scales(codes, each[: len(codes)], fetch(self.tensors[4]), self.nested)

    def packed(self, fetch: Fetch) -> Packed:
        """Return the codes, and the absmax of each block of the flat matrix."""
        if self.shape[-1] % 2:
            raise CheckpointError(f"{self.tensors[0]}: a byte has codes of two rows")
        octets = np.ascontiguousarray(fetch(self.tensors[0])).reshape(-1).view(np.uint8)
        codes = octets[: self.size // 2].reshape(self.shape[0], -1)
        scales = self._scales(slice(0, -(-self.size // self.block)), fetch)
        table = byte_table(fetch(self.tensors[2]), 4, high_first=True)
        return Packed(codes, table, scales, self.block)

    def quantiser(self, fetch: Fetch) -> Bits4Quantiser:
        """Return a quantiser with the arithmetic of bitsandbytes' generic functions."""
        table = np.array(fetch(self.tensors[2]))
        if self.nested is None:
            return Bits4Quantiser(self, table)
        state = np.array(fetch(self.tensors[-1]))
        return NestedQuantiser(self, table, np.array(fetch(self.tensors[4])), state)
