"""A second look at a merged shard: copied bytes, and a dense merge of a sample of rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from doraxp._base.types import Array
from doraxp.checkpoint._adapters import AdapterSet
from doraxp.checkpoint._plan import Task
from doraxp.checkpoint._rows import row_blocks
from doraxp.checkpoint._safetensors import DTYPES, CheckpointError, Reader

SAMPLE = 16
"""Rows of each matrix."""
_PRECISION = {
    "F64": (2.0**-52, 2.0**-1022),
    "F32": (2.0**-23, 2.0**-126),
    "F16": (2.0**-10, 2.0**-14),
    "BF16": (2.0**-7, 2.0**-126),
}
"""Epsilon and the smallest normal number."""


def verify_shard(
    reader: Reader, target: Path, tasks: Mapping[str, Task], adapters: AdapterSet
) -> None:
    """Raise CheckpointError unless every tensor of `target` is as it must be."""
    result = Reader(target)
    if list(result.tensors) != list(reader.tensors):
        raise CheckpointError(f"{target}: the tensors are not those of {reader.path}")
    for name in reader.tensors:
        task = tasks.get(name)
        source, original = reader, name
        if task is not None and task.replacement is not None:
            source, original = adapters.reader, task.replacement
        if task is not None and task.path is not None:
            _verify_merged(source, original, result, name, task, adapters)
        elif not _equal(source, original, result, name):
            raise CheckpointError(f"{target}: {name} is not the copy that it must be")


def _verify_merged(
    source: Reader, original: str, result: Reader, name: str, task: Task, adapters: AdapterSet
) -> None:
    layer = adapters[str(task.path)]
    a, b, m = (leaf.astype(np.float64) for leaf in layer.adapter)
    rows = np.unique(np.linspace(0, len(m) - 1, SAMPLE).astype(int))
    weight = _sample(source, original, task, rows)
    v = weight + layer.config.scaling * (b[rows] @ a)
    norm = np.linalg.norm(v, axis=1, keepdims=True)
    gain = np.divide(m[rows, None], norm, out=np.zeros_like(norm), where=norm > 0)
    desired = gain * v
    actual = _sample(result, name, task, rows)
    epsilon, normal = _PRECISION[result.tensors[name].dtype]
    # Below the smallest normal number the distance to the next one no longer shrinks.
    bound = np.maximum(np.abs(desired), normal) * epsilon
    # Where W and the update cancel, V has the rounding errors of W.
    largest = np.maximum(np.abs(v), np.abs(weight)).max(axis=1, keepdims=True)
    bound += 1e-5 * np.abs(gain) * largest
    if not (np.abs(actual - desired) <= bound).all():
        raise CheckpointError(f"{result.path}: {name} is not what a dense merge of it gives")


def _sample(reader: Reader, name: str, task: Task, rows: Array) -> Array:
    """Return some rows of the matrix, float64."""
    shape = reader.tensors[name].shape
    if task.kind.is_transposed:
        parts = [reader.read(name, block)[:, rows] for block in row_blocks(shape)]
        return np.concatenate(parts).astype(np.float64).T
    parts = [reader.read(name, slice(row, row + 1)).reshape(1, -1) for row in rows.tolist()]
    return np.concatenate(parts).astype(np.float64)


def _equal(source: Reader, original: str, result: Reader, name: str) -> bool:
    """Compare a copied tensor, converted where the dtypes differ."""
    before, after = source.tensors[original], result.tensors[name]
    if before.dtype == after.dtype:
        pairs = zip(source.chunks(original), result.chunks(name), strict=True)
        return before == after and all(one == other for one, other in pairs)
    dtype = DTYPES[after.dtype]
    return before.shape == after.shape and all(
        source.read(original, rows).astype(dtype).tobytes() == result.read(name, rows).tobytes()
        for rows in row_blocks(before.shape or (1,))
    )
