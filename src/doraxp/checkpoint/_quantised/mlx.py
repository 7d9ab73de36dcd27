"""MLX: affine codes of 2 to 8 bits, and the modes "mxfp4" and "mxfp8".

::

    P.weight    U32 (*stack, rows, words), the codes q as one string of bits, the low bits first
    P.scales    (*stack, rows, groups), in the model's dtype, or U8: the byte e of 2^(e - 127)
    P.biases    as the scales; only of affine codes

    W = round(round(q·scale) + bias)    rounded twice to the dtype of the scales
    W = number(q)·scale                 in mxfp4 and mxfp8, as bfloat16
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
    FP8_MAX,
    by_group,
    byte_table,
    bytes_to,
    flat_rows,
    fp4,
    fp4_numbers,
    fp4_pairs,
    fp8,
    fp8_numbers,
    halves,
    multiply,
    mx_scales,
    pack,
    powers,
    rounded,
    unpack,
)
from doraxp.checkpoint._quantised.protocol import (
    Fetch,
    Found,
    Packed,
    Quantised,
    Refused,
    Settings,
    UnfitError,
)
from doraxp.checkpoint._quantised.refused import ADVICE
from doraxp.checkpoint._safetensors import RAW, Empty

_FLOATS = ("F32", "BF16", "F16")
_BITS = (2, 3, 4, 5, 6, 8)
_MX_GROUP = 32
_EPSILON = np.float32(1e-7)
"""The least step between two codes."""


def find(tensors: Mapping[str, Tensor], settings: Settings, fetch: Fetch) -> Iterator[Found]:
    """Yield the weights of unsigned words with ``scales``."""
    for scales in tensors:
        module = scales.removesuffix(".scales")
        name = f"{module}.weight"
        if module == scales or name not in tensors or tensors[name].dtype != "U32":
            continue
        there = (name, scales) + (f"{module}.biases",) * (f"{module}.biases" in tensors)
        try:
            yield name, _how(module, there, tensors, settings)
        except UnfitError as error:
            yield name, Refused(there, f"is quantised (mlx) {error}")


def _how(
    module: str, there: tuple[str, ...], tensors: Mapping[str, Tensor], settings: Settings
) -> Affine | Mx:
    """Return how a weight is stored, and raise UnfitError where its tensors do not fit."""
    main, scales = tensors[there[0]], tensors[there[1]]
    if (
        len(main.shape) < 2
        or 0 in (*main.shape, *scales.shape)
        or scales.shape[:-1] != main.shape[:-1]
    ):
        raise UnfitError(
            f"in words of shape {main.shape}, which scales of {scales.shape} do not fit"
        )
    words, groups = main.shape[-1], scales.shape[-1]
    if len(there) == 2:
        return _mx(there, main, scales)
    biases = tensors[there[2]]
    if scales.dtype not in _FLOATS or biases != scales:
        raise UnfitError(
            f"with scales of {scales.dtype} of shape {scales.shape} and biases of {biases.dtype} "
            f"of shape {biases.shape}, which must be equal"
        )
    own = settings.entries.get(module)
    declared = own if isinstance(own, dict) else settings.entries
    bits, group = declared.get("bits"), declared.get("group_size")
    if not settings.entries:
        raise UnfitError(
            "in groups that its file does not tell: give the folder with its config.json"
        )
    if type(bits) is not int or bits not in _BITS or type(group) is not int or group < 1:
        raise UnfitError(f"in {bits!r} bits and groups of {group!r}, which are not known")
    columns = words * 32 // bits
    if words * 32 % bits or columns % 8 or columns != groups * group:
        raise UnfitError(
            f"in words of shape {main.shape} and scales of shape {scales.shape}, which {bits} bits "
            f"and groups of {group} do not give"
        )
    return Affine(there, Blocks((*main.shape[:-1], columns), (1, group)), main, scales, bits)


def _mx(there: tuple[str, ...], main: Tensor, scales: Tensor) -> Mx:
    """Return how a weight without biases is stored."""
    words, groups = main.shape[-1], scales.shape[-1]
    bits = {4 * groups: 4, 8 * groups: 8}.get(words)
    if words == 2 * groups and scales.dtype == "U8":
        raise UnfitError(f"in nvfp4 and {ADVICE}")
    if bits is None or scales.dtype != "U8":
        raise UnfitError(f"but {there[1].removesuffix('scales')}biases is missing")
    shape = (*main.shape[:-1], groups * _MX_GROUP)
    return Mx(there, Blocks(shape, (1, _MX_GROUP)), main, scales, bits)


@dataclass(frozen=True)
class _Words:
    """A weight of MLX."""

    tensors: tuple[str, ...]
    blocks: Blocks
    main: Tensor
    scales: Tensor
    bits: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.blocks.shape

    @property
    def step(self) -> int:
        """No two rows share a scale."""
        return 1

    def bytes_of(self, rows: slice, fetch: Fetch) -> HostArray:
        """Return the bytes of the codes of some rows."""
        words = flat_rows(self.tensors[0], self.main.shape, rows, fetch)
        return np.ascontiguousarray(words).view(np.uint8)

    def beside(self, name: str, rows: slice, fetch: Fetch) -> HostArray:
        """Return some rows of the scales or of the biases."""
        return flat_rows(name, self.scales.shape, rows, fetch)

    def words(self, packed: HostArray) -> HostArray:
        """Return bytes of codes as the main tensor has them."""
        return packed.view(np.uint32)


@dataclass(frozen=True)
class Affine(_Words):
    """A weight in affine codes."""

    @property
    def label(self) -> str:
        """The bits and the groups."""
        return f"mlx {self.bits} bits {self.blocks.size[1]}"

    @property
    def dtype(self) -> str:
        """The dtype of the scales."""
        return self.scales.dtype

    @property
    def resolution(self) -> float:
        """A step, which is up to two parts in 2^bits − 1; scale and bias may be rounded."""
        return 2.2 / ((1 << self.bits) - 1) + 2.0**-7

    def check(self, fetch: Fetch) -> None:
        """Raise CheckpointError unless all scales and biases are finite."""
        for name in self.tensors[1:]:
            if not np.isfinite(fetch(name).astype(np.float32)).all():
                raise CheckpointError(f"{name}: the numbers must be finite")

    def dequantise(self, rows: slice, fetch: Fetch, empty: Empty) -> HostArray:
        """Return some rows of the weight."""
        scales, biases = (self.beside(name, rows, fetch) for name in self.tensors[1:])
        return self.product(self.bytes_of(rows, fetch), scales, biases, empty)

    def product(
        self, packed: HostArray, scales: HostArray, biases: HostArray, empty: Empty
    ) -> HostArray:
        """Return rows from their codes, scales and biases."""
        values, group = unpack(packed, self.bits), self.blocks.size[1]
        multiply(values, scales.astype(np.float32), group)
        if self.dtype != "F32":
            values = rounded(values, self.dtype, np.empty).astype(np.float32)
        by_group(np.add, values, biases.astype(np.float32), group)
        return rounded(values, self.dtype, empty)

    def packed(self, fetch: Fetch) -> Packed:
        """Return the codes, and a scale and a bias for each group.

        Codes of 3, 5 and 6 bits take a byte each.
        """
        octets = self.bytes_of(slice(0, self.shape[0]), fetch)
        bits = self.bits if self.bits in (2, 4, 8) else 8
        if bits != self.bits:
            octets = unpack(octets, self.bits).astype(np.uint8)
        scale, bias = (fetch(name).astype(np.float32) for name in self.tensors[1:])
        table = byte_table(np.arange(1 << bits), bits)
        return Packed(octets, table, scale, self.blocks.size, bias)

    def quantiser(self, fetch: Fetch) -> AffineQuantiser:
        """Return a quantiser with the arithmetic of mx.quantize."""
        return AffineQuantiser(self)


class _Quantiser:
    """The scales of all rows, and the biases if there are any."""

    passes = 1

    def __init__(self, how: _Words) -> None:
        shape, dtype = how.scales.shape, RAW[how.scales.dtype]
        self._beside = {name: np.zeros(shape, dtype) for name in how.tensors[1:]}

    def measure(self, rows: slice, weight: HostArray) -> None:
        """Do nothing: there is one pass."""

    def _keep(self, rows: slice, *beside: HostArray) -> list[HostArray]:
        """Keep the scales, and the biases, of some rows, and return them as they are stored."""
        kept = []
        for tensor, part in zip(self._beside.values(), beside, strict=True):
            flat = tensor.reshape(-1, tensor.shape[-1])
            flat[rows] = part
            kept.append(flat[rows])
        return kept

    def rest(self) -> dict[str, HostArray]:
        """Return the scales, and the biases."""
        return self._beside


class AffineQuantiser(_Quantiser):
    """Quantises groups so that 0 and the number farthest from 0 have exact codes."""

    def __init__(self, how: Affine) -> None:
        super().__init__(how)
        self._how = how

    def quantise(self, rows: slice, weight: HostArray) -> Quantised:
        """Return the codes of some rows."""
        how, group = self._how, self._how.blocks.size[1]
        values = weight.astype(np.float32)
        least = how.blocks.reduced(np.minimum, values, rows)
        largest = how.blocks.reduced(np.maximum, values, rows)
        last = np.float32((1 << how.bits) - 1)
        is_below = np.abs(least) > np.abs(largest)
        scales = np.maximum((largest - least) / last, _EPSILON)
        scales = np.where(is_below, scales, -scales)
        edge = np.where(is_below, least, largest)
        code = np.rint(edge / scales)  # of the number that is 0, from the edge, which has code 0
        scales = np.where(code != 0, edge / np.where(code != 0, code, 1), scales)
        biases = np.where(code != 0, edge, np.float32(0))
        by_group(np.subtract, values, biases, group)
        by_group(np.divide, values, scales, group)
        codes = np.clip(np.rint(values, out=values), 0, last, out=values).astype(np.uint8)
        packed = pack(codes, how.bits)
        kept_scales, kept_biases = self._keep(rows, scales, biases)
        back = how.product(packed, kept_scales, kept_biases, np.empty)
        return Quantised(how.words(packed), back)


@dataclass(frozen=True)
class Mx(_Words):
    """A weight in mxfp4 or mxfp8."""

    dtype: str = "BF16"

    @property
    def label(self) -> str:
        """The mode."""
        return f"mlx mxfp{self.bits}"

    @property
    def resolution(self) -> float:
        """Half the distance from 4 to 6 as a part of 6, or of two numbers of FP8."""
        return 0.17 if self.bits == 4 else 2.0**-4

    def check(self, fetch: Fetch) -> None:
        """Raise CheckpointError where a scale is NaN."""
        name = self.tensors[1]
        if (fetch(name) == 255).any():
            raise CheckpointError(f"{name}: a scale must not be NaN (the byte 255)")

    def dequantise(self, rows: slice, fetch: Fetch, empty: Empty) -> HostArray:
        """Return some rows of the weight."""
        scales = self.beside(self.tensors[1], rows, fetch)
        return self.product(self.bytes_of(rows, fetch), scales, empty)

    def product(self, packed: HostArray, scales: HostArray, empty: Empty) -> HostArray:
        """Return rows from their codes and scales."""
        values = halves(fp4_pairs(), packed) if self.bits == 4 else bytes_to(fp8_numbers(), packed)
        multiply(values, bytes_to(powers(), scales), _MX_GROUP)
        return rounded(values, self.dtype, empty)

    def packed(self, fetch: Fetch) -> Packed:
        """Return the codes, and a power of 2 for each group."""
        octets = self.bytes_of(slice(0, self.shape[0]), fetch)
        numbers = fp4_numbers() if self.bits == 4 else fp8_numbers()
        scale = bytes_to(powers(), fetch(self.tensors[1]))
        return Packed(octets, byte_table(numbers, self.bits), scale, self.blocks.size)

    def quantiser(self, fetch: Fetch) -> MxQuantiser:
        """Return a quantiser with the arithmetic of mx.quantize."""
        return MxQuantiser(self)


class MxQuantiser(_Quantiser):
    """Quantises with the least powers of 2 that let no number be too large."""

    def __init__(self, how: Mx) -> None:
        super().__init__(how)
        self._how = how

    def quantise(self, rows: slice, weight: HostArray) -> Quantised:
        """Return the codes of some rows."""
        how = self._how
        values = weight.astype(np.float32)
        largest = how.blocks.reduced(np.maximum, np.abs(values), rows)
        scales = mx_scales(largest, 6 if how.bits == 4 else FP8_MAX)
        multiply(values, powers()[254 - scales], _MX_GROUP)
        packed = pack(fp4(values, ties_to_even=False), 4) if how.bits == 4 else fp8(values)
        (kept,) = self._keep(rows, scales.astype(np.uint8))
        return Quantised(how.words(packed), how.product(packed, kept, np.empty))
