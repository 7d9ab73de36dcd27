"""bitsandbytes: NF4 and FP4 with a scale for each block of the flat weight, and LLM.int8().

::

    4 bits      NAME                   two codes a byte, the high half first, (bytes, 1)
                NAME.absmax            F32, the scale of each block; or U8, codes of such scales
                NAME.quant_map         F32, the numbers of the 16 codes
                NAME.nested_absmax     of absmax in U8: its scale for each nested block,
                NAME.nested_quant_map  and the numbers of its 256 codes
                NAME.quant_state.…     JSON: the kind, the block, the dtype and the shape

    absmax = map[codes]·nested_absmax + offset     each operation is rounded to nested_dtype
    W = map[code]·absmax                           a float32 product, rounded once to the dtype

    8 bits      P.weight               I8 (rows, columns)
                P.SCB                  F32, the largest absolute value of each row

    W = q·SCB·(1/127)                              float32, rounded once to the model's dtype

A block may cross rows. The storage of the codes may have any dtype: the bytes count.
"""

from __future__ import annotations

import json
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
from doraxp.checkpoint._quantised.codes import byte_table, halves, multiply, pairs, rounded
from doraxp.checkpoint._quantised.protocol import (
    Fetch,
    Found,
    Packed,
    Quantisation,
    Quantised,
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
_TINY = np.float32(1e-38)
_TILE = 1 << 15


def find(tensors: Mapping[str, Tensor], settings: Settings, fetch: Fetch) -> Iterator[Found]:
    """Yield the weights with a ``quant_state``, and those in 8 bits with ``SCB``."""
    for name in tensors:
        weight, found, kind = name.partition(STATE)
        if found:
            yield weight, _in_4_bits(weight, kind, tensors, fetch)
        elif name.endswith(".SCB"):
            module = name.removesuffix(".SCB")
            yield f"{module}.weight", _in_8_bits(module, tensors, settings, fetch)


def _in_8_bits(
    module: str, tensors: Mapping[str, Tensor], settings: Settings, fetch: Fetch
) -> Quantisation | Refused:
    """Return how the weight of a module is stored in 8 bits."""
    names = tuple(f"{module}.{name}" for name in ("weight", "SCB", "weight_format"))
    there = tuple(name for name in names if name in tensors)
    weight, scales = tensors.get(names[0]), tensors[names[1]]
    if weight is None or weight.dtype != "I8" or len(weight.shape) != 2 or 0 in weight.shape:
        kind = "missing" if weight is None else f"{weight.dtype} of shape {weight.shape}"
        return Refused(there, f"is quantised (bitsandbytes, 8 bits), but {names[0]} is {kind}")
    if scales.dtype not in DTYPES or scales.shape != weight.shape[:1]:
        return Refused(
            there,
            f"is quantised (bitsandbytes, 8 bits), but SCB is {scales.dtype} of shape "
            f"{scales.shape}, and the weight has {weight.shape[0]} rows",
        )
    order = tensors.get(names[2])
    if order is not None and (order.dtype != "U8" or order.nbytes != 1 or fetch(names[2]).any()):
        return Refused(
            there,
            "is quantised (bitsandbytes, 8 bits) in the order of one GPU: load the model with "
            "bitsandbytes on that GPU and save it in rows",
        )
    return Int8(weight.shape, settings.dtype, there, scales.dtype)


@dataclass(frozen=True)
class Int8:
    """A weight in 8 bits with a scale for each row."""

    shape: tuple[int, ...]
    dtype: str
    tensors: tuple[str, ...]
    scale_dtype: str
    label: str = "int8 rows"
    step: int = 1
    resolution: float = 1 / 250
    """Half a step is 1/254; the scales may be rounded to 16 bits."""

    def check(self, fetch: Fetch) -> None:
        """Raise CheckpointError unless all scales are finite."""
        _check_finite(self.tensors[1], fetch)

    def dequantise(self, rows: slice, fetch: Fetch, empty: Empty) -> HostArray:
        """Return some rows of the weight."""
        return self.product(fetch(self.tensors[0], rows), fetch(self.tensors[1], rows), empty)

    def product(self, codes: HostArray, scales: HostArray, empty: Empty) -> HostArray:
        """Return rows from their codes and scales."""
        values = codes.astype(np.float32)
        values *= scales.astype(np.float32)[:, None]
        values *= np.float32(1 / 127)
        return rounded(values, self.dtype, empty)

    def packed(self, fetch: Fetch) -> Packed:
        """Return the codes, and SCB / 127 for each row."""
        codes, scales = fetch(self.tensors[0]), fetch(self.tensors[1]).astype(np.float32)
        table = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32)[:, None]
        scale = (scales * np.float32(1 / 127))[:, None]
        return Packed(codes.view(np.uint8), table, scale, (1, self.shape[-1]))

    def quantiser(self, fetch: Fetch) -> Int8Quantiser:
        """Return a quantiser with the arithmetic of int8_vectorwise_quant."""
        return Int8Quantiser(self)


class Int8Quantiser:
    """Quantises rows to 8 bits: the largest number of a row becomes 127."""

    passes = 1

    def __init__(self, how: Int8) -> None:
        self._how = how
        self._scales = np.zeros(how.shape[0], RAW[how.scale_dtype])

    def measure(self, rows: slice, weight: HostArray) -> None:
        """Do nothing: there is one pass."""

    def quantise(self, rows: slice, weight: HostArray) -> Quantised:
        """Return the codes of some rows."""
        values = weight.astype(np.float32)
        largest = np.abs(values).max(axis=1, initial=0).astype(self._scales.dtype)
        self._scales[rows] = largest
        scale = largest.astype(np.float32)
        # PyTorch divides a number by an array in these two steps.
        inverse = np.divide(1, scale, where=scale > 0, out=np.zeros_like(scale))
        values *= (inverse * np.float32(127))[:, None]
        codes = np.clip(np.rint(values, out=values), -127, 127).astype(np.int8)
        return Quantised(codes, self._how.product(codes, largest, np.empty))

    def rest(self) -> dict[str, HostArray]:
        """Return the scales."""
        return {self._how.tensors[1]: self._scales}


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
            _check_finite(tensor, fetch)

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


def nested_scales(
    codes: HostArray, absmax: HostArray, table: HostArray, nested: Nested
) -> HostArray:
    """Return scales from their codes, with a number of `absmax` for each of them, float32."""
    dtype = RAW[nested.dtype]
    with np.errstate(over="ignore", invalid="ignore"):
        products = (table[codes] * absmax).astype(dtype).astype(np.float32)
        return (products + np.float32(nested.offset)).astype(dtype).astype(np.float32)


class Bits4Quantiser:
    """Quantises to 4 bits: the largest number of a block becomes the table's 1."""

    passes = 1

    def __init__(self, how: Bits4, table: HostArray) -> None:
        self._how, self._table = how, table
        self._scales = np.zeros(-(-how.size // how.block), np.float32)

    def measure(self, rows: slice, weight: HostArray) -> None:
        """Do nothing: there is one pass."""

    def quantise(self, rows: slice, weight: HostArray) -> Quantised:
        """Return the codes of some rows."""
        how = self._how
        flat = weight.astype(np.float32).reshape(-1)
        first = rows.start * how.shape[-1] // how.block
        largest = _largest(flat, how.block)
        part = slice(first, first + len(largest))
        self._scales[part] = largest
        _normalise(flat, largest, how.block)
        order = np.argsort(self._table, kind="stable")
        codes = _nearest(flat, self._table[order])
        if how.kind != "nf4":
            codes = order.astype(np.uint8)[codes]
        codes = np.append(codes, np.zeros(len(codes) % 2, np.uint8))
        packed = codes[::2] << 4 | codes[1::2]
        back = how.numbers(packed, self._stored(part), self._table)[: len(flat)]
        stored = packed.view(RAW[how.main.dtype]).reshape(-1, *how.main.shape[1:])
        return Quantised(stored, rounded(back.reshape(weight.shape), how.dtype, np.empty))

    def _stored(self, blocks: slice) -> HostArray:
        """Return scales as the reader gives them."""
        return self._scales[blocks].astype(RAW[self._how.scale_dtype]).astype(np.float32)

    def rest(self) -> dict[str, HostArray]:
        """Return the scales."""
        return {self._how.tensors[1]: self._scales.astype(RAW[self._how.scale_dtype])}


class NestedQuantiser(Bits4Quantiser):
    """Quantises to 4 bits, and then the scales less their mean to 8 bits."""

    passes = 2

    def __init__(
        self, how: Bits4, table: HostArray, outer_table: HostArray, state: HostArray
    ) -> None:
        super().__init__(how, table)
        self._outer_table, self._state = outer_table, state
        self._rest: dict[str, HostArray] = {}

    def measure(self, rows: slice, weight: HostArray) -> None:
        """Take the scales of some rows."""
        block = self._how.block
        flat = weight.astype(np.float32).reshape(-1)
        first = rows.start * self._how.shape[-1] // block
        largest = _largest(flat, block)
        self._scales[first : first + len(largest)] = largest

    def _stored(self, blocks: slice) -> HostArray:
        self.rest()
        return self._read[blocks]

    def rest(self) -> dict[str, HostArray]:
        """Return the codes of the scales, their own scales, and the JSON with their mean."""
        if not self._rest:
            self._rest, self._read = self._quantised_scales()
        return self._rest

    def _quantised_scales(self) -> tuple[dict[str, HostArray], HostArray]:
        """Return the tensors beside the codes, and the scales as the reader gives them."""
        how = self._how
        nested = cast(Nested, how.nested)
        mean = float(np.mean(self._scales, dtype=np.float64))
        state, offset = _with_offset(self._state, mean, nested.offset)
        flat = self._scales - np.float32(offset)
        absmax = _largest(flat, nested.block).astype(RAW[nested.stored])
        outer = absmax.astype(np.float32)
        _normalise(flat, outer, nested.block)
        bounds = (self._outer_table[:-1] + self._outer_table[1:]) / 2
        codes = np.searchsorted(bounds, flat).astype(np.uint8)
        each = np.repeat(outer, nested.block)[: len(codes)]
        read = nested_scales(codes, each, self._outer_table, nested._replace(offset=offset))
        names = how.tensors
        return {names[1]: codes, names[3]: absmax, names[-1]: state}, read


def _with_offset(state: HostArray, offset: float, old: float) -> tuple[HostArray, float]:
    """Return the JSON with another offset, in as many bytes, and the offset that it has.

    9 digits give a float32 number exactly. Fewer are taken where the bytes do not suffice, and the
    old offset where not one suffices: any offset is right, the mean only costs the least accuracy.
    """
    words = json.loads(bytes(state.reshape(-1)))
    for digits in range(9, 0, -1):
        number = float(f"{offset:.{digits}g}")
        raw = json.dumps(words | {"nested_offset": number}).encode()
        if len(raw) <= state.size:
            padded = np.frombuffer(raw.ljust(state.size), np.uint8)
            return padded.reshape(state.shape).copy(), number
    return state, old


def _largest(flat: HostArray, block: int) -> HostArray:
    """Return the largest absolute value of each block; the last one may be short."""
    whole = len(flat) // block * block
    largest: HostArray = np.abs(flat[:whole]).reshape(-1, block).max(axis=1)
    if whole == len(flat):
        return largest
    return np.append(largest, np.maximum(np.abs(flat[whole:]).max(), _TINY))


def _normalise(flat: HostArray, largest: HostArray, block: int) -> None:
    """Divide each block in place by its largest value."""
    whole = len(flat) // block
    main = flat[: whole * block]
    multiply(main[None], (1 / np.maximum(largest[:whole], _TINY))[None], block)
    flat[whole * block :] /= largest[whole:]  # bitsandbytes divides here, and multiplies above
    np.clip(flat, -1, 1, out=flat)


def _nearest(values: HostArray, numbers: HostArray) -> HostArray:
    """Return the index of the nearest of a few ascending numbers; ties go to the lower one."""
    bounds = (numbers[:-1] + numbers[1:]) / 2
    codes = np.zeros(len(values), np.uint8)
    for start in range(0, len(values), _TILE):  # the comparisons of a tile stay in the cache
        tile, sums = values[start : start + _TILE], codes[start : start + _TILE]
        for bound in bounds:
            sums += tile > bound
    return codes


def _check_finite(name: str, fetch: Fetch) -> None:
    if not np.isfinite(fetch(name).astype(np.float32)).all():
        raise CheckpointError(f"{name}: the scales must be finite")
