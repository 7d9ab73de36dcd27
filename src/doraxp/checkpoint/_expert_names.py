"""The tensors of an adapter of a stack of experts, and the update of one expert or of all.

::

    ΔW[e] = B[e] A[e]       A (experts, rank, in)       B (experts, out, rank)

    PEFT's packing          A (experts·rank, in), expert by expert
                            B (out, rank·experts), in which the experts of one rank are neighbours
"""

from __future__ import annotations

import math
import threading
from typing import NamedTuple

import numpy as np

from doraxp._base.types import Array, HostArray
from doraxp._core.updates import LowRank, Mapped
from doraxp.backends import array_namespace
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._safetensors import Reader


class Stack(NamedTuple):
    """ΔW of all experts: the rows of the first one, then those of the next one."""

    lora_a: Array
    """A, (experts, rank, in)."""
    lora_b: Array
    """B, (experts, out, rank)."""

    @property
    def shape(self) -> tuple[int, int]:
        """(experts·out, in) of ΔW."""
        experts, out, _ = self.lora_b.shape
        return experts * out, self.lora_a.shape[2]

    def rows(self, rows: slice) -> Array:
        """Return some rows of ΔW, (k, in)."""
        xp, out = array_namespace(self.lora_a), self.lora_b.shape[1]
        parts, start = [], rows.start
        while start < rows.stop:
            expert, first = divmod(start, out)
            last = min(out, first + rows.stop - start)
            parts.append(self.lora_b[expert, first:last, :] @ self.lora_a[expert, :, :])
            start += last - first
        return parts[0] if len(parts) == 1 else xp.concat(parts)

    def scaled(self, factor: float) -> Stack:
        """Return factor · ΔW, with the factor in B."""
        return self._replace(lora_b=factor * self.lora_b)

    def mapped(self, function: Mapped) -> Stack:
        """Return the update of `function` of A and B."""
        return Stack(function(self.lora_a), function(self.lora_b))


class ExpertNames(NamedTuple):
    """The names of A, B and m of a stack of experts, of which one may be chosen."""

    lora_a: str
    lora_b: str
    experts: int
    magnitude: str | None = None
    is_packed: bool = False
    """Whether A and B have PEFT's packing."""
    by_model: bool = False
    """Whether the model's family tells if (B A)ᵀ is added to a square matrix, and not the file."""
    has_version: bool = True
    """Whether the file tells the version of PEFT."""
    expert: int | None = None
    """The expert whose update it is; None for that of all."""
    is_flipped: bool = False
    """Whether the update of the one expert is (B A)ᵀ."""

    def update(self, reader: Reader, rank: int) -> LowRank | Stack:
        """Return ΔW of the expert, or of all."""
        places = range(self.experts) if self.expert is None else [self.expert]
        found = [self._factors(reader, rank, place) for place in places]
        if self.expert is None:
            return Stack(*map(np.stack, zip(*found, strict=True)))
        (factors,) = found
        a, b = factors
        return LowRank(b.T, a.T) if self.is_flipped else LowRank(a, b)

    def read_magnitude(self, reader: Reader, name: str) -> HostArray:
        """Return m of the expert, or of all, flat."""
        if self.expert is not None:
            return _finite(reader, name, self.expert, self.experts, None).reshape(-1)
        every = range(self.experts)
        return np.concatenate(
            [_finite(reader, name, place, self.experts, None).reshape(-1) for place in every]
        )

    def _factors(self, reader: Reader, rank: int, expert: int) -> tuple[HostArray, HostArray]:
        a = _finite(reader, self.lora_a, expert, self.experts, None).reshape(rank, -1)
        columns = rank if self.is_packed else None
        b = _finite(reader, self.lora_b, expert, self.experts, columns)
        return a, b.reshape(-1, rank)


def _finite(
    reader: Reader, name: str, expert: int, experts: int, packed_rank: int | None
) -> HostArray:
    """Read the part of a tensor that is of one expert, and refuse NaN and infinity.

    `packed_rank` is the rank of a B in PEFT's packing.
    """
    if packed_rank is None:
        size = math.prod(reader.tensors[name].shape) // experts
        array = reader.read(name, slice(expert, expert + 1), shape=(experts, size))
    else:
        array = _LAST.by_expert(reader, name, packed_rank, experts)[expert]
    if not np.isfinite(array).all():
        raise CheckpointError(f"{reader.path}: {name} contains NaN or infinity in expert {expert}")
    return array


class _Last(threading.local):
    """The packed factors that a thread has read last.

    The columns of one expert are spread over the whole tensor. A merge needs those of all experts,
    one after the other, so without this it would read the tensor once for each. Where BASE has a
    tensor for each expert, those of gate, up and down take turns, and in a sum the adapters do.
    """

    _MOST = 8

    def __init__(self) -> None:
        self._arrays: dict[tuple[Reader, str], HostArray] = {}

    def __len__(self) -> int:
        return len(self._arrays)

    def by_expert(self, reader: Reader, name: str, rank: int, experts: int) -> HostArray:
        """Return a factor (out, rank·experts) as (experts, out, rank)."""
        found = self._arrays.pop((reader, name), None)
        if found is None:
            packed = reader.read(name)
            by_rank = packed.reshape(len(packed), rank, experts)
            found = np.ascontiguousarray(by_rank.transpose(2, 0, 1))
            for oldest in list(self._arrays)[: 1 - self._MOST]:
                del self._arrays[oldest]
        self._arrays[reader, name] = found  # the last one is the one that was used last
        return found


_LAST = _Last()
