"""One shard of a model: each tensor is read, merged or copied, and written."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

import numpy as np
import threadpoolctl

from doraxp._base.safetensors import Tensor, write_header
from doraxp._base.types import HostArray
from doraxp.checkpoint._change import Change, change
from doraxp.checkpoint._engine import Engine, Reused, load_engine
from doraxp.checkpoint._errors import CheckpointError
from doraxp.checkpoint._matrix import row_blocks
from doraxp.checkpoint._merge import Merge
from doraxp.checkpoint._options import merge_dtype
from doraxp.checkpoint._requantise import Piece, requantise
from doraxp.checkpoint._rounding import Stochastic, stochastic, to_either, to_nearest
from doraxp.checkpoint._rows import Block, Norms, alone, merged_blocks
from doraxp.checkpoint._safetensors import DTYPES, AnySource
from doraxp.checkpoint._survival import Survival
from doraxp.checkpoint._tasks import (
    Changed,
    Part,
    ReplacedTensor,
    RequantisedTensor,
    ScalesTensor,
    Task,
    part_name,
    parts_of,
    read_terms,
)

OnBytes: TypeAlias = Callable[[int], None]
"""Called with the number of bytes that were written."""
OnWrite: TypeAlias = Callable[[str, memoryview], None]
"""Called with the name of a tensor and its next bytes, which were written."""
WINDOW = 64 << 20
"""Bytes of a result that stay in the system's memory."""


class MergedWeight(NamedTuple):
    """A weight, or some rows of one, that has been merged and written."""

    name: str
    """The tensor's name, followed by the module's where the tensor is made part by part."""
    change: Change


def merge_shard(
    merge: Merge, shard: str, target: Path, on_write: OnWrite = lambda name, raw: None
) -> Iterator[MergedWeight]:
    """Write a merged shard to `target`, and yield each merged weight when it is written.

    The shard is complete, and on the disk, when the iterator ends. Each adapter is read once.
    """
    entries, tasks = merge.entries(shard), merge.tasks_of(shard)
    engine = load_engine(merge.options.backend)
    # The products are too thin to share: with a second thread they take longer, and on a busy
    # machine many times longer.
    with threadpoolctl.threadpool_limits(1), target.open("xb") as file:
        write_header(file, entries, merge.model.shards[shard].metadata)
        output = _Output(file, entries, on_write)
        for name, entry in entries.items():
            task, prefix = tasks[name], merge.model.prefix(shard)
            if isinstance(task, RequantisedTensor):
                yield from _requantised(merge, prefix, task, engine, output)
            elif not isinstance(task, ScalesTensor):
                yield from _rounded(merge, prefix, name, task, entry, engine, output)
        file.flush()
        os.fsync(file.fileno())


def _rounded(
    merge: Merge, prefix: str, name: str, task: Task, entry: Tensor, engine: Engine, output: _Output
) -> Iterator[MergedWeight]:
    """Write a tensor in a dtype of its own, and yield the weights that are merged in it."""
    random_bits = stochastic(name, entry, merge.options)
    start = 0  # the position in the tensor of the part's first number
    for part in parts_of(task):
        if not isinstance(part, Changed):
            _copy(name, part, entry, output)
            start += math.prod(part.source.tensor.shape)
            continue
        measured = _Measured(merge, part, entry)
        for block in measured.blocks(name, engine):
            written = output.write_array(name, block.merged, entry, start, random_bits)
            measured.survival.add(block, written)
            start += block.merged.size
        yield measured.weight(part_name(prefix + name, task, part))


class _Measured:
    """The merge of a part, and what its blocks change.

    Parameters
    ----------
    merge : Merge
    part : Changed
    entry : Tensor
        Of the tensor in the result.
    """

    def __init__(self, merge: Merge, part: Changed, entry: Tensor) -> None:
        self._source, self._terms = part.source, read_terms(part)
        self._dtype = merge_dtype(part.source.tensor, entry, merge.options)
        self._norms: list[Norms] = []
        self.survival = Survival(part.source.tensor.shape)

    def blocks(self, name: str, engine: Engine, multiple: int = 1) -> Iterator[Block]:
        """Yield the merged blocks; those of a second call are of the same numbers."""
        self._norms = []
        for block in merged_blocks(
            name, self._source, self._terms, engine, self._dtype, multiple=multiple
        ):
            yield block
            self._norms.append(block.norms)

    def weight(self, name: str, *, is_requantised: bool = False) -> MergedWeight:
        """Return the result under a name, when all blocks are written."""
        cosine = self.survival.cosine if is_requantised else None
        kept = self.survival.kept
        return MergedWeight(name, change(self._norms, alone(self._terms), kept, cosine))


def _copy(name: str, part: Part, entry: Tensor, output: _Output) -> None:
    """Write the part as it is, in the dtype of the result."""
    source = part.source
    if isinstance(part, ReplacedTensor) and part.dtype in DTYPES:
        for rows in _finite_rows(source):
            output.write_array(name, rows, entry)
    elif source.tensor.dtype == entry.dtype:
        for chunk in source.chunks():
            output.write(name, chunk)
    else:
        for rows in _rows(source):
            output.write_array(name, rows, entry)


def _requantised(
    merge: Merge, prefix: str, task: RequantisedTensor, engine: Engine, output: _Output
) -> Iterator[MergedWeight]:
    """Write a weight in the format of the base, and yield the weights that are merged in it."""
    quantisation, weight = task.stored.quantisation, task.stored
    columns = quantisation.shape[-1]
    parts = [
        (part, _Measured(merge, part, task.source.tensor) if isinstance(part, Changed) else None)
        for part in parts_of(task.task)
    ]

    def pieces() -> Iterator[Piece]:
        start = 0
        for part, measured in parts:
            if measured is None:
                for rows in _finite_rows(part.source):
                    exact = rows.reshape(-1, columns).astype(np.float32)
                    yield Piece(start, exact)
                    start += len(exact)
                continue
            for block in measured.blocks(weight.name, engine, quantisation.step):
                yield Piece(start, block.merged, block, measured.survival)
                start += len(block.merged)

    def write(tensor: str, numbers: HostArray) -> None:
        own = f"{merge.lead}{tensor.removeprefix(prefix)}"
        output.write(own, np.ascontiguousarray(numbers).reshape(-1).view(np.uint8).data)

    requantise(weight, pieces, write)
    for part, measured in parts:
        if isinstance(part, Changed) and measured is not None:
            label = part_name(f"{merge.lead}{weight.name}", task.task, part)
            yield measured.weight(label, is_requantised=True)


def _finite_rows(source: AnySource) -> Iterator[HostArray]:
    for rows in _rows(source):
        if not np.isfinite(rows).all():
            raise CheckpointError(f"{source.reader.path}: {source.name} contains NaN or infinity")
        yield rows


def _rows(source: AnySource) -> Iterator[HostArray]:
    shape = source.tensor.shape
    if 0 in shape or not shape:
        yield source.read()
    else:
        yield from (source.read(rows) for rows in row_blocks(shape))


class _Output:
    """The file of a shard, after its header. The tensors of it may be written in any order.

    Every 64 MiB the system is asked to write to the disk and to forget what it wrote. So the disk
    works beside the processor, and a large model does not push all else out of memory.
    """

    def __init__(self, file: BinaryIO, entries: Mapping[str, Tensor], on_write: OnWrite) -> None:
        self._file, self._on_write = file, on_write
        self._written, self._narrow = 0, Reused()
        sizes = [entry.nbytes for entry in entries.values()]
        starts = itertools.accumulate(sizes, initial=file.tell())
        self._place = dict(zip(entries, starts, strict=False))
        """Where the next bytes of each tensor belong."""

    def write(self, name: str, raw: memoryview) -> None:
        """Append bytes to a tensor."""
        if self._file.tell() != self._place[name]:
            self._file.seek(self._place[name])
        self._file.write(raw)
        self._place[name] += raw.nbytes
        before, self._written = self._written, self._written + raw.nbytes
        if self._written // WINDOW > before // WINDOW and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._on_write(name, raw)

    def write_array(
        self,
        name: str,
        rows: HostArray,
        tensor: Tensor,
        start: int = 0,
        random_bits: Stochastic | None = None,
    ) -> HostArray:
        """Append some rows of a tensor, rounded to the tensor's dtype, and return them.

        The next call may overwrite the result.

        Parameters
        ----------
        name : str
            The tensor's name, for errors.
        rows : array
        tensor : Tensor
        start : int
            The position in the tensor of the first element of `rows`.
        random_bits : Stochastic, optional
            Round up or down by them; by default to the nearest number.

        Raises
        ------
        CheckpointError
            A finite number in `rows` is infinity in that dtype.
        """
        dtype = DTYPES[tensor.dtype]
        try:
            if random_bits is None:
                written = to_nearest(rows, dtype, self._narrow)
            else:
                written = to_either(rows, dtype, random_bits, start, self._narrow)
        except FloatingPointError:
            raise CheckpointError(f"{name} has values too large for {dtype}") from None
        self.write(name, written.reshape(-1).view(np.uint8).data)
        return written
