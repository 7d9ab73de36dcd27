"""One shard of a model: read, merged, written."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import threadpoolctl

from doraxp._base.safetensors import Tensor, write_header
from doraxp._base.types import Array
from doraxp.checkpoint._adapters import AdapterSet
from doraxp.checkpoint._plan import Task
from doraxp.checkpoint._rows import (
    Change,
    Library,
    Norms,
    Reused,
    change,
    merge_rows,
    row_blocks,
)
from doraxp.checkpoint._safetensors import DTYPES, CheckpointError, Reader

OnBytes = Callable[[int], None]
"""Called with the number of bytes that were written."""
Write = Callable[[memoryview], None]
WINDOW = 64 << 20
"""Bytes of a result that stay in the system's memory."""


@dataclass(frozen=True)
class Options:
    """How to merge."""

    backend: str = "numpy"
    compute: str | None = None
    """"float32" or "float64"; None for float32 where what is read and written is narrower, else
    float64."""
    dtype: str | None = None
    """A key of `DTYPES`, for every floating tensor; None keeps each one's."""


def merge_shard(
    reader: Reader,
    target: Path,
    tasks: Mapping[str, Task],
    adapters: AdapterSet,
    options: Options,
    on_bytes: OnBytes = lambda count: None,
) -> dict[str, Change]:
    """Write a shard to `target`, merged, and return the change of each weight."""
    tensors = {name: written_as(tensor, options) for name, tensor in reader.tensors.items()}
    changes: dict[str, Change] = {}
    # The products are too thin to share: with a second thread they take longer, and on a busy
    # machine many times longer.
    with threadpoolctl.threadpool_limits(1), target.open("xb") as file:
        write_header(file, tensors, reader.metadata)
        write = _writer(file, on_bytes)
        for name, tensor in tensors.items():
            task = tasks.get(name)
            if task is not None and task.path is not None:
                norms: list[Norms] = []
                blocks = merged_rows(reader, name, task, adapters, options, norms)
                _write(write, name, blocks, tensor)
                changes[name] = change(norms, adapters[task.path])
            elif task is not None:
                _write(write, name, _finite_rows(adapters.reader, str(task.replacement)), tensor)
            elif reader.tensors[name].dtype == tensor.dtype:
                for chunk in reader.chunks(name):
                    write(chunk)
            else:
                _write(write, name, _rows(reader, name), tensor)
        file.flush()
        os.fsync(file.fileno())
    return changes


def written_as(tensor: Tensor, options: Options) -> Tensor:
    """Return how a tensor of the base is written."""
    if options.dtype is None or tensor.dtype not in DTYPES or tensor.dtype == options.dtype:
        return tensor
    items = tensor.nbytes // DTYPES[tensor.dtype].itemsize
    return Tensor(options.dtype, tensor.shape, items * DTYPES[options.dtype].itemsize)


def merged_rows(
    reader: Reader,
    name: str,
    task: Task,
    adapters: AdapterSet,
    options: Options,
    norms: list[Norms],
) -> Iterator[Array]:
    """Yield the rows of a merged weight as stored, and add the norms of its matrix to `norms`."""
    source, original = (adapters.reader, task.replacement) if task.replacement else (reader, name)
    base = reader.tensors[name]
    dtypes = {source.tensors[original].dtype, written_as(base, options).dtype}
    compute = options.compute or ("float32" if dtypes <= {"F16", "BF16"} else "float64")
    layer = adapters[str(task.path)]
    layer = layer._replace(kind=task.kind, shape=base.shape)
    library, stored = load_library(options.backend), Reused()
    try:
        for rows, sides in merge_rows(
            lambda rows: source.read(original, rows, stored), layer, library, compute
        ):
            if sides is not None:
                if not all(np.isfinite(side).all() for side in sides):
                    raise CheckpointError(f"{source.path}: {original} has NaN or infinity in it")
                norms.append(sides)
            yield rows
    except FloatingPointError:
        raise CheckpointError(f"{name} has values too large for {compute}") from None


def _finite_rows(reader: Reader, name: str) -> Iterator[Array]:
    for rows in _rows(reader, name):
        if not np.isfinite(rows).all():
            raise CheckpointError(f"{reader.path}: {name} has NaN or infinity in it")
        yield rows


def _rows(reader: Reader, name: str) -> Iterator[Array]:
    shape = reader.tensors[name].shape
    if 0 in shape or not shape:
        yield reader.read(name)
    else:
        yield from (reader.read(name, rows) for rows in row_blocks(shape))


def _writer(file: BinaryIO, on_bytes: OnBytes) -> Write:
    """Return what writes to the file.

    The system is asked to send to the disk what was written, and then to forget it: so the disk
    works beside the processor, the pages are used again, and a large model does not push all else
    out of memory.
    """
    written = 0

    def write(raw: memoryview) -> None:
        nonlocal written
        file.write(raw)
        before, written = written, written + raw.nbytes
        if written // WINDOW > before // WINDOW and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        on_bytes(raw.nbytes)

    return write


def _write(write: Write, name: str, blocks: Iterator[Array], tensor: Tensor) -> None:
    dtype, narrow = DTYPES[tensor.dtype], Reused()
    for rows in blocks:
        try:
            with np.errstate(over="raise"):
                written = np.ascontiguousarray(narrow.cast(rows, dtype))
            if tensor.dtype == "BF16":
                _check_overflow(rows, written)
        except FloatingPointError:
            raise CheckpointError(f"{name} has values too large for {dtype}") from None
        raw = written.reshape(-1).view(np.uint8)
        write(raw.data)


def _check_overflow(rows: Array, written: Array) -> None:
    """Do for bfloat16 what NumPy does for its own dtypes: the cast tells of no overflow."""
    bits = written.view(np.uint16)
    # Of the numbers of one sign infinity has the largest bits, so this is faster than isfinite.
    if bits.view(np.int16).max(initial=0) < 0x7F80 and bits.max(initial=0) < 0xFF80:
        return
    if (np.isfinite(rows) & ~np.isfinite(written)).any():
        raise FloatingPointError


def load_library(backend: str) -> Library:
    """Return the way to an array library and back."""
    if backend == "torch":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        return Library(
            lambda x: torch.asarray(x, device=device), operator.matmul, lambda x: x.cpu().numpy()
        )
    if backend == "cupy":
        import cupy

        return Library(cupy.asarray, operator.matmul, cupy.asnumpy)
    empty = Reused()

    def product(left: Array, right: Array) -> Array:
        out = empty((left.shape[0], right.shape[1]), left.dtype)
        return np.matmul(left, right, out=out)

    return Library(lambda x: x, product, lambda x: x)
