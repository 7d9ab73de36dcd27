"""The audit of a tensor that should be a copy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from doraxp._base.types import HostArray
from doraxp._base.words import counted
from doraxp.checkpoint._audit_sample import adapter_dtypes
from doraxp.checkpoint._audit_weight import INFINITE, Verdict, adapted_norms
from doraxp.checkpoint._engine import Engine
from doraxp.checkpoint._matrix import row_blocks
from doraxp.checkpoint._merge import Merge
from doraxp.checkpoint._precision import coarsest, count_infinite
from doraxp.checkpoint._safetensors import DTYPES, Source, same_bytes
from doraxp.checkpoint._shard import OnBytes
from doraxp.checkpoint._slack import Slack, over
from doraxp.checkpoint._tasks import CopiedTensor, MergedTensor, ReplacedTensor


class Copy:
    """A tensor that should be a copy of the base's, or of the adapter's own.

    Parameters
    ----------
    merge : Merge
    name : str
        The tensor's name in the base.
    task : ReplacedTensor or CopiedTensor
    stored : Source
        The tensor in the merged model.
    engine : Engine
    """

    def __init__(
        self,
        merge: Merge,
        name: str,
        task: ReplacedTensor | CopiedTensor,
        stored: Source,
        engine: Engine,
    ) -> None:
        self._merge, self._name, self._engine = merge, name, engine
        self._task, self._source, self._stored = task, task.source, stored

    def verdict(self, on_bytes: OnBytes) -> Verdict:
        """Return the verdict; `on_bytes` is called with numbers of bytes that were audited."""
        before, after = self._source.tensor, self._stored.tensor
        if before.shape != after.shape:
            on_bytes(before.nbytes)
            return Verdict("another shape", False, f"{after.shape} for {before.shape}")
        is_copied = isinstance(self._task, CopiedTensor)
        changed = "changed" if is_copied else "not the adapter's"
        is_same = before.dtype == after.dtype and self._has_same_bytes(on_bytes)
        if before.dtype != after.dtype:
            on_bytes(before.nbytes)
        # Equal bytes of the base have its NaN and infinity.
        if before.dtype not in DTYPES or (is_same and is_copied):
            return Verdict("equal" if is_same else changed, is_same)
        infinite = differ = 0
        largest = 0.0
        for rows, one, other in self._blocks():
            infinite += self._count_new_infinite(rows, other)
            is_other = (_bits(one) != _bits(other)) & ~(np.isnan(one) & np.isnan(other))
            if is_other.any():
                differ += int(np.count_nonzero(is_other))
                with np.errstate(invalid="ignore"):
                    difference = np.abs(other.astype(np.float64) - one)[is_other]
                largest = max(largest, float(difference.max()))
        if infinite:
            return Verdict(INFINITE, False, f"{counted(infinite, 'number')}, finite in BASE")
        if not differ:
            return Verdict("equal" if before.dtype == after.dtype else "converted", True)
        detail = f"{counted(differ, 'number', 'differs')}, by up to {largest:.3g}"
        return Verdict("bias scaled" if self._is_scaled() else changed, False, detail)

    def _has_same_bytes(self, on_bytes: OnBytes) -> bool:
        equal = True
        for one, other in zip(self._source.chunks(), self._stored.chunks(), strict=True):
            equal = equal and same_bytes(one, other)
            on_bytes(len(one))
        return equal

    def _blocks(self) -> Iterator[tuple[slice | None, HostArray, HostArray]]:
        """Yield the place of some rows, and the rows of both, in the dtype of the merged file."""
        dtype = DTYPES[self._stored.tensor.dtype]
        shape = self._source.tensor.shape
        for rows in [None] if 0 in shape or not shape else row_blocks(shape):
            with np.errstate(over="ignore", invalid="ignore"):
                yield rows, self._source.read(rows).astype(dtype), self._stored.read(rows)

    def _count_new_infinite(self, rows: slice | None, stored: HostArray) -> int:
        """Return how many numbers are NaN or infinity where the base has finite ones."""
        if not count_infinite(stored):
            return 0
        is_new = ~np.isfinite(stored)
        base = (
            self._merge.base(self._name) if isinstance(self._task, ReplacedTensor) else self._source
        )
        if base is not None and base.tensor[:2] == self._source.tensor[:2]:
            is_new &= np.isfinite(base.read(rows))
        return int(np.count_nonzero(is_new))

    def _is_scaled(self) -> bool:
        """Return True if this is the bias of a module, multiplied by m / n."""
        weight = f"{self._name.removesuffix('bias')}weight"
        task = self._merge.tasks.get(weight)
        if not self._name.endswith(".bias") or not isinstance(task, MergedTensor):
            return False
        layer = task.read()
        m = layer.magnitude
        if m is None:
            return False
        norm = adapted_norms(weight, task, layer, self._engine)
        if self._source.tensor.shape != norm.shape:
            return False
        gain = over(m, norm)
        scaled = gain * self._source.read().astype(np.float64)
        files = (self._stored.tensor, self._source.tensor, task.source.tensor)
        dtypes = (
            *(tensor.dtype for tensor in files),
            *adapter_dtypes(layer),
        )
        # W' is gain V, and this is gain bias: the update has no part in it.
        bound = Slack(layer, coarsest(dtypes)).bound(
            np.abs(scaled)[:, None], slice(None), norm, slice(0, 1)
        )[:, 0]
        with np.errstate(invalid="ignore"):
            difference = np.abs(self._stored.read().astype(np.float64) - scaled)
        return bool((difference <= bound).all())


def _bits(numbers: HostArray) -> NDArray[np.unsignedinteger]:
    return numbers.view(f"u{numbers.itemsize}")
