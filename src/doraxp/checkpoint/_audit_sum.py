"""The audit of a weight to which changes of several adapters should have been added.

W  before the merge     W' = W + Σ strength (W'ᵢ − W)     S  the weight that the file has
"""

from __future__ import annotations

import numpy as np

from doraxp._base.types import HostArray
from doraxp._core.kinds import LayerKind
from doraxp.checkpoint._audit_errors import DAMAGED, Compared, compare
from doraxp.checkpoint._audit_sample import Dtypes
from doraxp.checkpoint._audit_weight import INFINITE, Verdict
from doraxp.checkpoint._engine import Engine
from doraxp.checkpoint._matrix import row_blocks
from doraxp.checkpoint._options import Options, merge_dtype
from doraxp.checkpoint._precision import Precision
from doraxp.checkpoint._rows import merged_blocks
from doraxp.checkpoint._safetensors import DTYPES, Source
from doraxp.checkpoint._shard import OnBytes
from doraxp.checkpoint._slack import Places, Wide
from doraxp.checkpoint._tasks import SummedTensor


class SumSlack:
    """The largest error of a right sum: ε (4 + 4 Σ |strength|) times the largest number of a row.

    The steps of W'ᵢ are not known, so the largest number of a row stands for all that are added.
    """

    def __init__(self, total: float, precision: Precision) -> None:
        self._factor, self._normal = 4 + 4 * total, precision.normal
        self._epsilon = precision.epsilon

    def bound(
        self, size: HostArray, rows: Places, norm: Wide, columns: Places = slice(None)
    ) -> HostArray:
        """Return the bound for some rows, in the shape and dtype of `size`, which is abs(W')."""
        largest = np.maximum(size.max(axis=1, keepdims=True), self._normal)
        return np.broadcast_to(self._factor * self._epsilon * largest, size.shape).astype(
            size.dtype
        )


def audit_sum(
    name: str, task: SummedTensor, stored: Source, engine: Engine, on_bytes: OnBytes
) -> Verdict:
    """Return the verdict on a weight; the arguments are those of `audit_weight`."""
    before, after = task.source.tensor, stored.tensor
    if before.shape != after.shape:
        on_bytes(before.nbytes)
        return Verdict("another shape", False, f"{after.shape} for {before.shape}")
    terms, row_bytes = task.read(), before.nbytes // before.shape[0]
    dtype = merge_dtype(before, after, Options())
    total = sum(abs(strength) for strength in task.strengths)
    found = compare(
        merged_blocks(name, task.source, terms, engine, dtype),
        stored,
        LayerKind("conv" if len(before.shape) > 2 else "linear"),
        Dtypes(after.dtype, before.dtype, *[after.dtype] * 3),
        lambda precision: SumSlack(total, precision),
        lambda count: on_bytes(row_bytes * count),
    )
    if found.infinite:
        return Verdict(INFINITE, False, f"{found.infinite:,} numbers", None, found.worst)
    if not found.wrong:
        return Verdict("rounded" if found.differ else "exact", True, "", None, found.worst)
    return _fault(task, stored, found)


def _fault(task: SummedTensor, stored: Source, found: Compared) -> Verdict:
    dtype, size = DTYPES[stored.tensor.dtype], int(np.prod(stored.tensor.shape))
    with np.errstate(over="ignore"):
        is_unchanged = all(
            np.array_equal(task.source.read(rows).astype(dtype), stored.read(rows))
            for rows in row_blocks(stored.tensor.shape)
        )
    if is_unchanged:
        return Verdict("unchanged", False, "the merge did nothing", None, found.worst)
    if found.wrong <= DAMAGED * size:
        detail = f"{found.wrong:,} of {size:,} numbers"
        return Verdict("damaged", False, detail, None, found.worst)
    return Verdict("another sum", False, f"{found.wrong:,} numbers differ", None, found.worst)
