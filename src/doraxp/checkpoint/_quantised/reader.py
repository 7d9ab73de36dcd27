"""A quantised weight seen as a tensor of a file, with the numbers that its own library computes."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from doraxp._base.safetensors import Tensor
from doraxp._base.types import HostArray
from doraxp.checkpoint._matrix import row_blocks
from doraxp.checkpoint._quantised.protocol import Fetch, Quantisation
from doraxp.checkpoint._safetensors import RAW, AnySource, Empty, Reader, Source, SumSource
from doraxp.checkpoint._stamp import CHUNK


class QuantisedReader:
    """Acts as the open file of one tensor, which it reads from several tensors and dequantises.

    Parameters
    ----------
    name : str
        The name of the weight.
    quantisation : Quantisation
        How it is stored.
    sources : mapping of str to Source
        The tensors on disk that it consists of, by name. They may be in several files.
    """

    def __init__(
        self, name: str, quantisation: Quantisation, sources: Mapping[str, Source]
    ) -> None:
        self.name, self.quantisation, self.sources = name, quantisation, dict(sources)
        shape, dtype = quantisation.shape, quantisation.dtype
        # A file has one tensor of this name, with the entry that a dense weight would have.
        size = math.prod(shape) * RAW[dtype].itemsize
        self.tensors: Mapping[str, Tensor] = {name: Tensor(dtype, shape, size)}

    @property
    def path(self) -> Path:
        """The file with the codes."""
        return self.sources[self.quantisation.tensors[0]].reader.path

    @property
    def stored_bytes(self) -> int:
        """The bytes on disk."""
        return sum(source.tensor.nbytes for source in self.sources.values())

    @property
    def fetch(self) -> Fetch:
        """A function that reads the tensors on disk."""
        return _Fetch(self.sources)

    def check(self) -> None:
        """Raise CheckpointError where values on disk break a rule of the format."""
        self.quantisation.check(self.fetch)

    def read(
        self,
        name: str,
        rows: slice | None = None,
        empty: Empty = np.empty,
        shape: tuple[int, ...] | None = None,
    ) -> HostArray:
        """Return the weight, or some rows of it, as `Reader.read` does."""
        whole = self.tensors[name].shape
        shape = whole if shape is None else shape
        rows = slice(0, shape[0]) if rows is None else rows
        each = math.prod(shape[1:]) // whole[-1]  # rows of the matrix in one of `shape`
        of_matrix = slice(rows.start * each, rows.stop * each)
        array = self.quantisation.dequantise(of_matrix, self.fetch, empty)
        return array.reshape(rows.stop - rows.start, *shape[1:])

    def chunks(self, name: str, window: slice | None = None) -> Iterator[memoryview]:
        """Yield the bytes of the dequantised weight, in chunks as `Reader.chunks` has them."""
        whole = self.tensors[name]
        flat = (math.prod(whole.shape[:-1]), whole.shape[-1])
        row = whole.nbytes // max(1, flat[0])
        first, last = (0, flat[0]) if window is None else (window.start // row, window.stop // row)
        left = b""
        for block in row_blocks((last - first, flat[1])):
            array = self.read(name, slice(first + block.start, first + block.stop), shape=flat)
            raw = left + array.reshape(-1).view(np.uint8).tobytes()
            whole_chunks = len(raw) // CHUNK * CHUNK
            for start in range(0, whole_chunks, CHUNK):
                yield memoryview(raw)[start : start + CHUNK]
            left = raw[whole_chunks:]
        if left:
            yield memoryview(left)

    def again(self, fresh: Mapping[Path, Reader]) -> QuantisedReader:
        """Return the same weight in files that were opened anew."""
        sources = {name: source.reopened(fresh) for name, source in self.sources.items()}
        return QuantisedReader(self.name, self.quantisation, sources)

    @property
    def files(self) -> tuple[Reader, ...]:
        """The files that have its tensors."""
        return tuple(file for source in self.sources.values() for file in source.reader.files)


def quantised_in(source: AnySource) -> QuantisedReader | None:
    """Return the quantised weight that a tensor is, or is added to; None for all others."""
    source = source.base if isinstance(source, SumSource) else source
    return source.reader if isinstance(source.reader, QuantisedReader) else None


def quantised_as(source: AnySource) -> str | None:
    """Return how a tensor of a model is quantised, such as "nf4 64"; None for a dense one."""
    weight = quantised_in(source)
    return None if weight is None else weight.quantisation.label


class _Fetch:
    """Reads tensors on disk. The experts that one block of rows took serve the next one."""

    _last = threading.local()

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._sources = sources

    def __call__(self, name: str, rows: slice | None = None) -> HostArray:
        source = self._sources[name]
        if rows is None or len(source.tensor.shape) < 3:
            return source.read(rows)
        if getattr(self._last, "sources", None) is not self._sources:
            self._last.sources, self._last.arrays = self._sources, {}
        arrays: dict[str, tuple[slice, HostArray]] = self._last.arrays
        if name not in arrays or arrays[name][0] != rows:
            arrays.pop(name, None)  # before the next one takes memory
            arrays[name] = rows, source.read(rows)
        return arrays[name][1]
