"""Row norms of the base beside m, from a few rows of each weight and all of B, before a merge.

::

    fresh          B = 0     m = ‖W‖        the adapter has not been trained
    trained        B ≠ 0     m ≠ ‖W‖        the usual case
    merged before  B ≠ 0     m = ‖W‖        for ‖W'‖ = m; or m was never trained
    other base     B = 0     m ≠ ‖W‖        for a fresh m is the norm of its own base
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from doraxp.checkpoint._matrix import Reading, row_blocks, source_rows
from doraxp.checkpoint._merge import Merge
from doraxp.checkpoint._safetensors import Source
from doraxp.checkpoint._tasks import MergedTensor, merged_in, parts_of
from doraxp.checkpoint._update_names import TensorNames

ROWS = 16
"""Rows of each weight, side by side: one read."""
_EQUAL = {"F64": 2.0**-17, "F32": 2.0**-17, "F16": 2.0**-10, "BF16": 2.0**-8}
"""The largest relative difference of ‖wᵢ‖ and mᵢ that rounding causes, if a trainer computed the
norms of a weight in its own dtype, or merged in it."""


_READ = 64 << 20
"""Bytes of the largest weight that is read as a whole, because its matrix is stored transposed."""


class SampledNorms(NamedTuple):
    """The modules whose norms and adapters contradict each other."""

    modules: int
    """The number of modules that were looked at."""
    equal: list[str]
    """Modules with B ≠ 0 and ‖wᵢ‖ = mᵢ in all rows of the sample."""
    fresh_and_unequal: list[str]
    """Modules with B = 0 and ‖wᵢ‖ ≠ mᵢ in some row of the sample."""


def sample_norms(merge: Merge) -> SampledNorms:
    """Compare ‖wᵢ‖ with mᵢ in some rows of each adapted weight, and B with 0.

    A weight above 64 MiB that is stored transposed, as embeddings are, is left out.

    Raises
    ------
    CheckpointError
        A file has changed since it was planned.
    OSError
        A file cannot be read.
    """
    modules, equal, unequal = 0, [], []
    parts = (part for task in merge.tasks.values() for part in parts_of(task))
    for task in (one for part in parts for one in merged_in(part)):
        name = task.layer.names.magnitude
        if name is None:
            continue
        if task.layer.kind.is_transposed and task.source.tensor.nbytes > _READ:
            continue
        modules += 1
        out = task.layer.kind.matrix_shape(task.layer.shape)[-2]
        middle = max(0, (out - ROWS) // 2)
        rows = slice(middle, min(middle + ROWS, out))
        is_fresh = _is_fresh(task)
        if _norms_are_m(task, name, rows):
            if not is_fresh:
                equal.append(task.path)
        elif is_fresh:
            unequal.append(task.path)
    return SampledNorms(modules, equal, unequal)


def _norms_are_m(task: MergedTensor, name: str, rows: slice) -> bool:
    """Return True if ‖wᵢ‖ = mᵢ in all of the rows, to the rounding of the dtypes.

    `name` is that of m in the file.
    """
    reader = task.adapters.reader
    m = np.abs(np.asarray(task.adapters.magnitude(task.layer))[rows].astype(np.float64))
    with np.errstate(over="ignore"):  # a norm that overflows is not m
        norms = np.linalg.norm(
            source_rows(task.source, np.arange(rows.start, rows.stop), task.layer.kind),
            axis=1,
        )
    dtypes = task.source.tensor.dtype, reader.tensors[name].dtype
    limit = max(_EQUAL[dtype] for dtype in dtypes)
    with np.errstate(invalid="ignore"):  # a merge refuses NaN and infinity
        is_near = np.abs(norms - m) <= limit * norms
    return bool((np.isfinite(norms) & is_near).all())


def _is_fresh(task: MergedTensor) -> bool:
    """Return True if ΔW = 0. The first rows of a trained one nearly always show that it is not."""
    names = task.layer.names
    if isinstance(names, TensorNames):
        b = Source(task.adapters.reader, names.lora_b)
        return _is_zero(b.read, b.tensor.shape)
    update = task.read().adapter.update
    return _is_zero(lambda rows: np.asarray(update.rows(rows)), update.shape)


def _is_zero(read: Reading, shape: tuple[int, ...]) -> bool:
    first = slice(0, min(ROWS, shape[0]))
    return not any(read(rows).any() for rows in (first, *row_blocks(shape)))
