"""bitsandbytes in 8 bits, LLM.int8(): a scale for each row.

::

    P.weight               I8 (rows, columns)
    P.SCB                  F32, the largest absolute value of each row

    W = q·SCB·(1/127)      float32, rounded once to the model's dtype
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from doraxp._base.safetensors import Tensor
from doraxp._base.types import HostArray
from doraxp.checkpoint._quantised.codes import check_finite, rounded
from doraxp.checkpoint._quantised.protocol import (
    Fetch,
    Found,
    Packed,
    Quantisation,
    Quantised,
    Refused,
    Settings,
)
from doraxp.checkpoint._safetensors import DTYPES, RAW, Empty


def find(tensors: Mapping[str, Tensor], settings: Settings, fetch: Fetch) -> Iterator[Found]:
    """Yield the weights with ``SCB``."""
    for name in tensors:
        if name.endswith(".SCB"):
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
        check_finite(self.tensors[1], fetch)

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
