"""The check of a merged shard: bytes of copied tensors, and some rows of each merged one.

The rows are compared with a dense merge in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._plan import MergedTensor, Task
from doraxp.checkpoint._rows import row_blocks
from doraxp.checkpoint._safetensors import DTYPES, Reader, Source
from doraxp.layers import AdaptedLayer

SAMPLE = 16
"""Rows of each matrix."""
_PRECISION = {
    "F64": (2.0**-52, 2.0**-1022),
    "F32": (2.0**-23, 2.0**-126),
    "F16": (2.0**-10, 2.0**-14),
    "BF16": (2.0**-7, 2.0**-126),
}
"""Epsilon and the smallest normal number."""


class Sample(NamedTuple):
    """The part of an adapter that acts on some rows of its matrix.

    It takes less memory than an adapter of a high rank, so a shard's samples can be kept until the
    shard is complete, and no adapter must be read again.
    """

    rows: NDArray[np.intp]
    update: NDArray[np.float64]
    """s (B A)ᵢ, (k, in)."""
    magnitude: NDArray[np.float64]


def sample_of(layer: AdaptedLayer) -> Sample:
    """Return a sample of evenly spaced rows, the first and the last one included."""
    a, b, m = (np.asarray(leaf, np.float64) for leaf in layer.adapter)
    rows = np.unique(np.linspace(0, len(m) - 1, SAMPLE).astype(np.intp))
    return Sample(rows, layer.config.scaling * (b[rows] @ a), m[rows])


def verify_shard(
    reader: Reader, target: Path, tasks: Mapping[str, Task], samples: Mapping[str, Sample]
) -> None:
    """Raise CheckpointError unless `target` has the tensors of `reader`, merged or copied.

    Parameters
    ----------
    reader : Reader
        The shard of the base.
    target : Path
        The merged shard.
    tasks : mapping of str to Task
    samples : mapping of str to Sample
        Of each merged weight, by name.
    """
    result = Reader(target)
    if list(result.tensors) != list(reader.tensors):
        raise CheckpointError(f"{target}: the tensors are not those of {reader.path}")
    for name in reader.tensors:
        task, written = tasks[name], Source(result, name)
        if isinstance(task, MergedTensor):
            _verify_merged(task, written, samples[name])
        elif not _equal(task.source, written):
            raise CheckpointError(f"{target}: {name} is not a copy of {task.source.name}")


def _verify_merged(task: MergedTensor, written: Source, sample: Sample) -> None:
    is_transposed = task.layer.kind.is_transposed
    weight = _matrix_rows(task.source, sample.rows, is_transposed=is_transposed)
    v = weight + sample.update
    norm = np.linalg.norm(v, axis=1, keepdims=True)
    gain = np.divide(sample.magnitude[:, None], norm, out=np.zeros_like(norm), where=norm > 0)
    desired = gain * v
    actual = _matrix_rows(written, sample.rows, is_transposed=is_transposed)
    epsilon, normal = _PRECISION[written.tensor.dtype]
    # Below the smallest normal number the distance to the next one no longer shrinks.
    bound = np.maximum(np.abs(desired), normal) * epsilon
    # Where W and the update cancel, V has the rounding errors of W.
    largest = np.maximum(np.abs(v), np.abs(weight)).max(axis=1, keepdims=True)
    bound += 1e-5 * np.abs(gain) * largest
    if not (np.abs(actual - desired) <= bound).all():
        raise CheckpointError(
            f"{written.reader.path}: {written.name} is not the result of a dense merge"
        )


def _matrix_rows(
    source: Source, rows: NDArray[np.intp], *, is_transposed: bool
) -> NDArray[np.float64]:
    """Return some rows of the matrix."""
    if is_transposed:
        parts = [source.read(block)[:, rows] for block in row_blocks(source.tensor.shape)]
        return np.concatenate(parts).astype(np.float64).T
    parts = [source.read(slice(row, row + 1)).reshape(1, -1) for row in rows.tolist()]
    return np.concatenate(parts).astype(np.float64)


def _equal(source: Source, written: Source) -> bool:
    """Compare a copied tensor with its source, converted where the dtypes differ."""
    before, after = source.tensor, written.tensor
    if before.dtype == after.dtype:
        pairs = zip(source.chunks(), written.chunks(), strict=True)
        return before == after and all(one == other for one, other in pairs)
    dtype = DTYPES[after.dtype]
    return before.shape == after.shape and all(
        source.read(rows).astype(dtype).tobytes() == written.read(rows).tobytes()
        for rows in row_blocks(before.shape or (1,))
    )
