"""One shard of a model: read, merged, written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import threadpoolctl

from doraxp._tensors import Tensor, write_header
from doraxp._types import Array
from doraxp.checkpoint._adapters import AdapterSet
from doraxp.checkpoint._plan import Task
from doraxp.checkpoint._rows import Change, Library, Norms, change, merge_rows, row_blocks
from doraxp.checkpoint._safetensors import DTYPES, CheckpointError, Reader

OnBytes = Callable[[int], None]
"""Called with the number of bytes that were written."""


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
        for name, tensor in tensors.items():
            task = tasks.get(name)
            if task is not None and task.path is not None:
                norms: list[Norms] = []
                blocks = merged_rows(reader, name, task, adapters, options, norms)
                _write(file, name, blocks, tensor, on_bytes)
                changes[name] = change(norms, adapters[task.path])
                continue
            source, original = reader, name
            if task is not None and task.replacement is not None:
                source, original = adapters.reader, task.replacement
            if source.tensors[original].dtype == tensor.dtype:
                for chunk in source.chunks(original):
                    file.write(chunk)
                    on_bytes(len(chunk))
            else:
                _write(file, name, _rows(source, original), tensor, on_bytes)
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
    library = load_library(options.backend)
    for rows, sides in merge_rows(
        lambda rows: source.read(original, rows), layer, library, compute
    ):
        if sides is not None:
            if not all(np.isfinite(side).all() for side in sides):
                raise CheckpointError(f"{source.path}: {original} has NaN or infinity in it")
            norms.append(sides)
        yield rows


def _rows(reader: Reader, name: str) -> Iterator[Array]:
    shape = reader.tensors[name].shape
    if 0 in shape or not shape:
        yield reader.read(name)
    else:
        yield from (reader.read(name, rows) for rows in row_blocks(shape))


def _write(
    file: BinaryIO, name: str, blocks: Iterator[Array], tensor: Tensor, on_bytes: OnBytes
) -> None:
    dtype = DTYPES[tensor.dtype]
    for rows in blocks:
        try:
            with np.errstate(over="raise"):
                narrow = np.ascontiguousarray(rows, dtype)
        except FloatingPointError:
            raise CheckpointError(f"{name} has values too large for {dtype}") from None
        raw = narrow.reshape(-1).view(np.uint8)
        file.write(raw.data)
        on_bytes(raw.nbytes)


def load_library(backend: str) -> Library:
    """Return the way to an array library and back."""
    if backend == "torch":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        return Library(lambda x: torch.asarray(x, device=device), lambda x: x.cpu().numpy())
    if backend == "cupy":
        import cupy

        return Library(cupy.asarray, cupy.asnumpy)
    return Library(lambda x: x, lambda x: x)
