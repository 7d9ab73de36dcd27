"""One shard of a model: each tensor is read, merged or copied, and written."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
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
from doraxp.checkpoint._rounding import Stochastic, stochastic, to_either, to_nearest
from doraxp.checkpoint._rows import alone, merged_blocks
from doraxp.checkpoint._safetensors import DTYPES, AnySource
from doraxp.checkpoint._survival import Survival
from doraxp.checkpoint._tasks import (
    Changed,
    Part,
    ReplacedTensor,
    part_name,
    parts_of,
    read_terms,
)

OnBytes: TypeAlias = Callable[[int], None]
"""Called with the number of bytes that were written."""
OnWrite: TypeAlias = Callable[[memoryview], None]
"""Called with bytes of tensors that were written, in their order."""
WINDOW = 64 << 20
"""Bytes of a result that stay in the system's memory."""


class MergedWeight(NamedTuple):
    """A weight, or some rows of one, that has been merged and written."""

    name: str
    """The tensor's name, followed by the module's where the tensor is made part by part."""
    change: Change


def merge_shard(
    merge: Merge, shard: str, target: Path, on_write: OnWrite = lambda raw: None
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
        output = _Output(file, on_write)
        for name, entry in entries.items():
            start = 0  # the position in the tensor of the part's first number
            for part in parts_of(tasks[name]):
                work = _PartWork(merge, name, entry, engine, output, start)
                if isinstance(part, Changed):
                    label = part_name(merge.model.prefix(shard) + name, tasks[name], part)
                    yield work.merged(label, part)
                else:
                    work.copied(part)
                start += math.prod(part.source.tensor.shape)
        file.flush()
        os.fsync(file.fileno())


class _PartWork(NamedTuple):
    """The place of a part of a tensor in the output."""

    merge: Merge
    name: str
    entry: Tensor
    engine: Engine
    output: _Output
    start: int

    def merged(self, name: str, part: Changed) -> MergedWeight:
        """Merge and write the part; return it under `name`."""
        options, source = self.merge.options, part.source
        terms = read_terms(part)
        norms, survival = [], Survival(source.tensor.shape)
        dtype = merge_dtype(source.tensor, self.entry, options)
        random_bits = stochastic(self.name, self.entry, options)
        for block in merged_blocks(self.name, source, terms, self.engine, dtype):
            start = self.start + block.rows.start * math.prod(source.tensor.shape[1:])
            written = self.output.write_array(
                self.name, block.merged, self.entry, start, random_bits
            )
            survival.add(block, written)
            norms.append(block.norms)
        return MergedWeight(name, change(norms, alone(terms), survival.kept))

    def copied(self, part: Part) -> None:
        """Write the part as it is, in the dtype of the result."""
        source = part.source
        if isinstance(part, ReplacedTensor) and part.dtype in DTYPES:
            for rows in _finite_rows(source):
                self.output.write_array(self.name, rows, self.entry)
        elif source.tensor.dtype == self.entry.dtype:
            for chunk in source.chunks():
                self.output.write(chunk)
        else:
            for rows in _rows(source):
                self.output.write_array(self.name, rows, self.entry)


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
    """The file of a shard, after its header.

    Every 64 MiB the system is asked to write to the disk and to forget what it wrote. So the disk
    works beside the processor, and a large model does not push all else out of memory.
    """

    def __init__(self, file: BinaryIO, on_write: OnWrite) -> None:
        self._file, self._on_write = file, on_write
        self._written, self._narrow = 0, Reused()

    def write(self, raw: memoryview) -> None:
        """Append bytes."""
        self._file.write(raw)
        before, self._written = self._written, self._written + raw.nbytes
        if self._written // WINDOW > before // WINDOW and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._on_write(raw)

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
        self.write(written.reshape(-1).view(np.uint8).data)
        return written
