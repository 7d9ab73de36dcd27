"""The quantisers of bitsandbytes in 4 bits: codes, scales, and the codes of nested scales."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, cast

import numpy as np

from doraxp._base.types import HostArray
from doraxp.checkpoint._quantised.codes import multiply, rounded
from doraxp.checkpoint._quantised.protocol import (
    Quantised,
)
from doraxp.checkpoint._safetensors import RAW

if TYPE_CHECKING:
    from doraxp.checkpoint._quantised.bitsandbytes_4bit import Bits4, Nested

_TINY = np.float32(1e-38)
_TILE = 1 << 15


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
        nested = cast("Nested", how.nested)
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
