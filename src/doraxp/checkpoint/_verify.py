"""The check of a merged shard: bytes of copied tensors, and some rows of each merged one.

The rows are compared with a dense merge in float64.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._merge import Merge
from doraxp.checkpoint._precision import PRECISION
from doraxp.checkpoint._rows import matrix_rows, row_blocks
from doraxp.checkpoint._safetensors import DTYPES, AnySource, Reader, Source, are_equal
from doraxp.checkpoint._tasks import MergedTensor, parts_of
from doraxp.layers import AdaptedLayer

SAMPLE = 16
"""Rows of each matrix."""


class _Sample(NamedTuple):
    """The part of an adapter that acts on some rows of its matrix."""

    rows: NDArray[np.intp]
    update: NDArray[np.float64]
    """s (B A)ᵢ, (k, in)."""
    magnitude: NDArray[np.float64]


def _sample_of(layer: AdaptedLayer) -> _Sample:
    """Return a sample of evenly spaced rows, the first and the last one included."""
    a, b, m = (np.asarray(leaf, np.float64) for leaf in layer.adapter)
    rows = np.unique(np.linspace(0, len(m) - 1, SAMPLE).astype(np.intp))
    return _Sample(rows, layer.config.scaling * (b[rows] @ a), m[rows])


def verify_shard(merge: Merge, name: str, target: Path) -> None:
    """Raise CheckpointError unless the file `target` is the shard `name` of the result.

    The shards of the base, the adapter and `target` are opened anew. So no place of a tensor comes
    from the plan.
    """
    shard, tasks = merge.model.shards[name], merge.tasks_of(name)
    # A tied head may come from another shard than that of its place.
    sources = [part.source.reader for task in tasks.values() for part in parts_of(task)]
    readers = {reader.path: reader for reader in (shard, merge.adapters.reader, *sources)}
    fresh = {path: reader.reopened() for path, reader in readers.items()}
    adapters = dataclasses.replace(merge.adapters, reader=fresh[merge.adapters.reader.path])
    result = Reader(target)
    if (
        list(result.tensors.items()) != list(merge.entries(name).items())
        or result.metadata != fresh[shard.path].metadata
    ):
        raise CheckpointError(f"{target}: the tensors are not those of {shard.path}")
    for tensor, task in tasks.items():
        start = 0
        for part in parts_of(task):
            source = part.source.reopened(fresh)
            written = Source(result, tensor)
            if source.tensor.shape != written.tensor.shape:
                rows = source.tensor.shape[0]
                written, start = written.rows(start, start + rows), start + rows
            if isinstance(part, MergedTensor):
                _verify_merged(source, written, adapters.read(part.layer))
            elif not _equal(source, written):
                raise CheckpointError(f"{target}: {tensor} is not a copy of {source.name}")


def _verify_merged(source: AnySource, written: AnySource, layer: AdaptedLayer) -> None:
    sample = _sample_of(layer)
    weight = matrix_rows(source, sample.rows, layer.kind)
    v = weight + sample.update
    norm = np.linalg.norm(v, axis=1, keepdims=True)
    gain = np.divide(sample.magnitude[:, None], norm, out=np.zeros_like(norm), where=norm > 0)
    desired = gain * v
    actual = matrix_rows(written, sample.rows, layer.kind)
    epsilon, normal = PRECISION[written.tensor.dtype]
    # Below the smallest normal number the distance to the next one no longer shrinks.
    bound = np.maximum(np.abs(desired), normal) * epsilon
    # Where W and the update cancel, V has the rounding errors of W.
    largest = np.maximum(np.abs(v), np.abs(weight)).max(axis=1, keepdims=True)
    bound += 1e-5 * np.abs(gain) * largest
    if not (np.abs(actual - desired) <= bound).all():
        raise CheckpointError(
            f"{written.reader.path}: {written.name} is not the result of a dense merge"
        )


def _equal(source: AnySource, written: AnySource) -> bool:
    """Compare a copied tensor with its source, converted where the dtypes differ."""
    before, after = source.tensor, written.tensor
    if before.dtype == after.dtype:
        return are_equal(source, written)
    dtype = DTYPES[after.dtype]
    return before.shape == after.shape and all(
        source.read(rows).astype(dtype).tobytes() == written.read(rows).tobytes()
        for rows in row_blocks(before.shape or (1,))
    )
