"""The check of a merged shard: bytes of copied tensors, and some rows of each merged one.

The rows are compared with a dense merge in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from doraxp._core.kinds import LayerKind
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._matrix import Wide, row_blocks, source_rows
from doraxp.checkpoint._merge import Merge
from doraxp.checkpoint._precision import PRECISION
from doraxp.checkpoint._quantised.reader import QuantisedReader, quantised_in
from doraxp.checkpoint._rows import Term, alone
from doraxp.checkpoint._safetensors import DTYPES, AnySource, Reader, Source, are_equal
from doraxp.checkpoint._tasks import (
    Changed,
    MergedTensor,
    RequantisedTensor,
    ScalesTensor,
    WrittenTask,
    parts_of,
)
from doraxp.checkpoint._updated_layer import UpdatedLayer

SAMPLE = 16
"""Rows of each matrix."""


def verify_shard(merge: Merge, name: str, target: Path) -> None:
    """Raise CheckpointError unless the file `target` is the shard `name` of the result.

    The shards of the base, the adapter and `target` are opened anew. So no place of a tensor comes
    from the plan.
    """
    shard, tasks = merge.model.shards[name], merge.tasks_of(name)
    # A tied head may come from another shard than that of its place.
    sources = [file for task in tasks.values() for file in _files(task)]
    files = (shard, *(adapters.reader for adapters in merge.adapters), *sources)
    fresh = {path: reader.reopened() for path, reader in {one.path: one for one in files}.items()}
    result = Reader(target)
    if (
        list(result.tensors.items()) != list(merge.entries(name).items())
        or result.metadata != fresh[shard.path].metadata
    ):
        raise CheckpointError(f"{target}: the tensors are not those of {shard.path}")
    for tensor, task in tasks.items():
        if isinstance(task, ScalesTensor):
            continue  # read with the codes
        start = 0
        stored = Source(result, tensor)
        if isinstance(task, RequantisedTensor):
            stored, task = _requantised(merge, name, result, task), task.task
        for part in parts_of(task):
            source = part.source.reopened(fresh)
            written = stored.like(source)
            if source.tensor.shape != written.tensor.shape:
                rows = source.tensor.shape[0]
                written, start = written.rows(start, start + rows), start + rows
            if isinstance(part, Changed):
                _verify_merged(source, written, _reopened(part, fresh))
            elif not (_equal(source, written) or _is_near(source, written)):
                raise CheckpointError(f"{target}: {tensor} is not a copy of {source.name}")


def _files(task: WrittenTask) -> Iterator[Reader]:
    """Yield the files of the base and of the adapter that a task reads."""
    if isinstance(task, RequantisedTensor):
        task = task.task
    for part in (task,) if isinstance(task, ScalesTensor) else parts_of(task):
        yield from part.source.reader.files


def _requantised(merge: Merge, shard: str, result: Reader, task: RequantisedTensor) -> Source:
    """Return a weight that was quantised again, dequantised from the file of the result."""
    prefix, weight = merge.model.prefix(shard), task.stored
    sources = {
        name: Source(result, f"{merge.lead}{name.removeprefix(prefix)}") for name in weight.sources
    }
    return Source(QuantisedReader(weight.name, weight.quantisation, sources), weight.name)


def _reopened(part: Changed, fresh: Mapping[Path, Reader]) -> tuple[Term, ...]:
    """Return the adapters of a part, read from files that were opened anew."""
    if isinstance(part, MergedTensor):
        adapters = replace(part.adapters, reader=fresh[part.adapters.reader.path])
        return (Term(adapters.read(part.layer)),)
    terms = []
    for one, strength in zip(part.terms, part.strengths, strict=True):
        if isinstance(one, MergedTensor):
            terms += [replace(term, strength=strength) for term in _reopened(one, fresh)]
        else:
            terms.append(Term(one.source.reopened(fresh), strength))
    return tuple(terms)


def _verify_merged(source: AnySource, written: AnySource, terms: Sequence[Term]) -> None:
    shape = source.tensor.shape
    kinds = [term.layer.rows_kind for term in terms if isinstance(term.layer, UpdatedLayer)]
    kind = next((one for one in kinds if one.is_transposed), None)
    kind = kind or LayerKind("conv" if len(shape) > 2 else "linear")
    out = kind.matrix_shape(shape)[0] if kind.is_transposed else shape[0]
    # Evenly spaced rows, the first and the last one included.
    rows = np.unique(np.linspace(0, out - 1, SAMPLE).astype(np.intp))
    weight = source_rows(source, rows, kind)
    desired, largest = _dense(source, rows, weight, terms[0], kind)
    if alone(terms) is None:
        desired, largest = weight.copy(), np.abs(weight).max(axis=1, keepdims=True)
        for term in terms:
            merged, reach = _dense(source, rows, weight, term, kind)
            desired += term.strength * (merged - weight)
            largest += abs(term.strength) * (reach + np.abs(weight).max(axis=1, keepdims=True))
    actual = source_rows(written, rows, kind)
    epsilon, normal = PRECISION[written.tensor.dtype]
    # Below the smallest normal number the distance to the next one no longer shrinks.
    bound = np.maximum(np.abs(desired), normal) * epsilon + 1e-5 * largest
    quantised = quantised_in(written)
    if quantised is not None:
        how = quantised.quantisation
        bound += how.resolution * _reach(written, rows, kind, how.step)
    if not (np.abs(actual - desired) <= bound).all():
        raise CheckpointError(
            f"{written.reader.path}: {written.name} is not the result of a dense merge"
        )


def _reach(written: AnySource, rows: NDArray[np.intp], kind: LayerKind, step: int) -> Wide:
    """Return the largest number of all that may share a scale with each of some rows, (k, 1)."""
    count = written.tensor.shape[0]
    blocks = [slice(0, count)]  # a row across those of the file has numbers of all of them
    if not kind.is_transposed:
        firsts = (int(row) // step * step for row in rows)
        blocks = [slice(first, min(first + step, count)) for first in firsts]
    largest = [np.abs(written.read(block).astype(np.float64)).max() for block in blocks]
    return np.broadcast_to(np.array(largest)[:, None], (len(rows), 1))


def _dense(
    source: AnySource, rows: NDArray[np.intp], weight: Wide, term: Term, kind: LayerKind
) -> tuple[Wide, Wide]:
    """Return rows of W' of one term, in float64, and the largest numbers that were added there."""
    layer = term.layer
    if not isinstance(layer, UpdatedLayer):
        whole = source_rows(layer, rows, kind)
        return whole, np.abs(whole).max(axis=1, keepdims=True)
    m = layer.magnitude
    if m is not None and layer.kind.is_transposed != kind.is_transposed:
        return _across(source, rows, term, layer)
    v = weight + layer.update_rows(rows, kind)
    # Where W and the update cancel, V has the rounding errors of W.
    largest = np.maximum(np.abs(v), np.abs(weight)).max(axis=1, keepdims=True)
    if m is None:
        return v, largest
    norm = np.linalg.norm(v, axis=1, keepdims=True)
    gain = np.divide(m[rows, None], norm, out=np.zeros_like(norm), where=norm > 0)
    return gain * v, np.abs(gain) * largest


def _across(
    source: AnySource, rows: NDArray[np.intp], term: Term, layer: UpdatedLayer
) -> tuple[Wide, Wide]:
    """Return rows of W' across those that have norms, as `_dense` does; this needs all of W."""
    every = np.arange(layer.kind.matrix_shape(layer.shape)[0])
    weight = source_rows(source, every, layer.kind)
    merged, largest = _dense(source, every, weight, term, layer.kind)
    inner = merged.shape[1] if layer.kind.is_transposed else layer.shape[1]
    across: Wide = merged.reshape(len(every), inner, -1).swapaxes(0, 1)[rows]
    return across.reshape(len(rows), -1), np.full((len(rows), 1), largest.max())


def _is_near(source: AnySource, written: AnySource) -> bool:
    """Return whether a quantised weight has its source's numbers, to the steps of the format."""
    quantised = quantised_in(written)
    if quantised is None:
        return False
    how, epsilon = quantised.quantisation, PRECISION[written.tensor.dtype].epsilon
    for rows in row_blocks(source.tensor.shape, how.step):
        one, other = (x.read(rows).astype(np.float64) for x in (source, written))
        size = np.abs(other)
        bound = how.resolution * size.max(initial=0.0) + epsilon * size
        if (np.abs(one - other) > bound).any():
            return False
    return True


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
