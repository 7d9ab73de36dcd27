"""safetensors files from strangers: a checked header, and reads of some rows at a time.

The safetensors library checks the header. It would map the whole file into memory and write only
whole arrays, so this package reads and writes the bytes itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias, TypedDict, cast

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from doraxp._base.safetensors import Tensor
from doraxp._base.types import HostArray
from doraxp.checkpoint._errors import CheckpointError, changed, gguf
from doraxp.checkpoint._json import SIZE_LIMIT, check_values, parse_json
from doraxp.checkpoint._stamp import (
    CHUNK,
    Stamp,
    check_stamps,
    chunks,
    fill,
    opened,
    read_up_to,
    settled_stamp_of,
    stamp_of,
)

Empty: TypeAlias = Callable[[tuple[int, ...], np.dtype[np.generic]], HostArray]
"""Allocates an array, as `np.empty` does."""

DTYPES: dict[str, np.dtype[np.generic]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""The dtypes that a merge computes with. Tensors of all other dtypes are only copied."""
RAW: dict[str, np.dtype[np.generic]] = DTYPES | {
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "F8_E8M0": np.dtype("u1"),
}
"""The dtypes that are read; those with a byte for each number are read as the bytes."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_LFS, _GGUF = b"version ", b"GGUF"
_NAME_LIMIT = 500


class _Entry(TypedDict):
    dtype: str
    shape: list[int]
    data_offsets: list[int]


class Reader:
    """An open safetensors file; only its header is in memory.

    Each read compares the file's stamp with that of the file whose header this is.

    Parameters
    ----------
    path : Path

    Raises
    ------
    CheckpointError
        The file breaks a rule of the format.
    OSError
        The file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        header, self.stamp, raw = _checked_header(path)
        self._data, self._header = len(raw), _digest(raw)
        self._stamp_here: Stamp | None = self.stamp
        """The stamp that the file has on this host; None as long as that is not known."""
        # The library has checked the types of all entries.
        self.metadata = cast(dict[str, str], header.pop("__metadata__", None) or {})
        entries = cast(dict[str, _Entry], header)
        _check_names(path, entries)
        self.tensors: dict[str, Tensor] = {}
        """In the order of the file."""
        self._starts: dict[str, int] = {}
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = entry["data_offsets"]
            self.tensors[name] = Tensor(entry["dtype"], tuple(entry["shape"]), stop - start)
            self._starts[name] = start

    def read(
        self,
        name: str,
        rows: slice | None = None,
        empty: Empty = np.empty,
        shape: tuple[int, ...] | None = None,
    ) -> HostArray:
        """Return a tensor, or some rows of it, in an array that `empty` allocates.

        The tensor's dtype must be one of `RAW`. `shape` is another shape of the whole tensor.
        """
        tensor = self.tensors[name]
        dtype, offset = RAW[tensor.dtype], 0
        shape = tensor.shape if shape is None else shape
        if rows is not None:
            shape = (rows.stop - rows.start, *shape[1:])
            offset = rows.start * math.prod(shape[1:]) * dtype.itemsize
        array = empty(shape, dtype)
        with self._opened() as file:
            file.seek(self._data + self._starts[name] + offset)
            fill(file, array.reshape(-1).view(np.uint8).data, self.path)
        return array

    def chunks(self, name: str, window: slice | None = None) -> Iterator[memoryview]:
        """Yield the bytes of a tensor of any dtype. Each chunk overwrites the one before.

        `window` limits them to these bytes of the tensor.
        """
        window = slice(0, self.tensors[name].nbytes) if window is None else window
        with self._opened() as file:
            file.seek(self._data + self._starts[name] + window.start)
            yield from chunks(file, window.stop - window.start, self.path)

    def reopened(self) -> Reader:
        """Return a new Reader of the file, and raise ChangedError if it is another file."""
        with self._opened():
            fresh = Reader(self.path)
        if fresh.stamp != self._stamp_here:
            raise changed(self.path)
        return fresh

    def again(self, fresh: Mapping[Path, Reader]) -> Reader:
        """Return the one of `fresh` that is this file, opened anew."""
        return fresh[self.path]

    @property
    def files(self) -> tuple[Reader, ...]:
        """The file itself, alone. A quantised weight may be in several files."""
        return (self,)

    def __getstate__(self) -> dict[str, object]:
        return vars(self) | {"_stamp_here": None}

    @contextlib.contextmanager
    def _opened(self) -> Iterator[FileIO]:
        """Open the file, and raise ChangedError unless it is the same one before and after."""
        with opened(self.path) as file:
            self._check(file)
            yield file
            self._check(file)

    def _check(self, file: FileIO) -> None:
        stamp = stamp_of(file)
        if self._stamp_here is None:
            # This Reader came from another process, perhaps on a host that has other numbers for
            # the file.
            now, planned = ((x.size, x.mtime_ns) for x in (stamp, self.stamp))
            if now == planned and _digest(read_up_to(file, self._data)) == self._header:
                self._stamp_here = stamp
        if stamp != self._stamp_here:
            raise changed(self.path)


class TensorFile(Protocol):
    """An open file with tensors, as `Source` reads it."""

    @property
    def path(self) -> Path:
        """The file, for messages."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The entries of the tensors."""

    @property
    def files(self) -> tuple[Reader, ...]:
        """The files on disk."""

    def read(
        self,
        name: str,
        rows: slice | None = None,
        empty: Empty = np.empty,
        shape: tuple[int, ...] | None = None,
    ) -> HostArray:
        """Return a tensor, or some rows of it, as `Reader.read` does."""

    def chunks(self, name: str, window: slice | None = None) -> Iterator[memoryview]:
        """Yield the bytes of a tensor, as `Reader.chunks` does."""

    def again(self, fresh: Mapping[Path, Reader]) -> TensorFile:
        """Return the same tensors in files that were opened anew."""


class Source(NamedTuple):
    """One tensor in an open file, or a window of its rows, which acts as a tensor."""

    reader: TensorFile
    name: str
    window: slice | None = None
    """Rows with a start and a stop; None for all of the tensor."""
    shape: tuple[int, ...] | None = None
    """The shape in which the tensor is seen; None for that of the header."""

    @property
    def _whole(self) -> Tensor:
        whole = self.reader.tensors[self.name]
        return whole if self.shape is None else whole._replace(shape=self.shape)

    @property
    def tensor(self) -> Tensor:
        """The tensor's entry in the header, or that of the rows."""
        whole = self._whole
        if self.window is None:
            return whole
        rows = self.window.stop - self.window.start
        return Tensor(whole.dtype, (rows, *whole.shape[1:]), whole.nbytes // whole.shape[0] * rows)

    def read(self, rows: slice | None = None, empty: Empty = np.empty) -> HostArray:
        """Return the tensor, or some rows of it, as `Reader.read` does."""
        if self.window is not None:
            rows = slice(0, self.tensor.shape[0]) if rows is None else rows
            rows = slice(self.window.start + rows.start, self.window.start + rows.stop)
        return self.reader.read(self.name, rows, empty, self.shape)

    def chunks(self) -> Iterator[memoryview]:
        """Yield the tensor's bytes, as `Reader.chunks` does."""
        if self.window is None:
            return self.reader.chunks(self.name)
        whole = self._whole
        row = whole.nbytes // whole.shape[0]
        return self.reader.chunks(self.name, slice(self.window.start * row, self.window.stop * row))

    def rows(self, start: int, stop: int) -> Source:
        """Return a window of rows of this source."""
        first = 0 if self.window is None else self.window.start
        return self._replace(window=slice(first + start, first + stop))

    def flat(self) -> Source:
        """Return a stack of matrices (*stack, rows, columns) seen as one matrix."""
        *rows, columns = self.tensor.shape
        return self._replace(shape=(math.prod(rows), columns))

    def like(self, other: AnySource) -> Source:
        """Return this tensor flat where `other`, which has rows of it, is seen flat."""
        is_flat = isinstance(other, Source) and other.shape is not None
        return self.flat() if is_flat and self.shape is None else self

    def reopened(self, fresh: Mapping[Path, Reader]) -> Source:
        """Return the same tensor in files that were opened anew."""
        return self._replace(reader=self.reader.again(fresh))


class SumSource(NamedTuple):
    """A tensor of the base plus `scale` times one of an adapter's file, which acts as a tensor."""

    base: Source
    difference: Source
    scale: float = 1.0

    @property
    def reader(self) -> TensorFile:
        """The file with the tensor that is added."""
        return self.difference.reader

    @property
    def name(self) -> str:
        """The name of the tensor that is added."""
        return self.difference.name

    @property
    def tensor(self) -> Tensor:
        """The entry of the base's tensor."""
        return self.base.tensor

    def read(self, rows: slice | None = None, empty: Empty = np.empty) -> HostArray:
        """Return the sum, or some rows of it, in float64."""
        base, difference = self.base.read(rows), self.difference.read(rows)
        result = empty(base.shape, np.dtype(np.float64))
        np.multiply(difference, self.scale, out=result, dtype=np.float64)
        result += base
        return result

    def chunks(self) -> Iterator[memoryview]:
        """Yield the bytes of the sum in the base's dtype."""
        rounded = self.read().astype(DTYPES[self.tensor.dtype])
        raw = rounded.reshape(-1).view(np.uint8).data
        yield from (raw[start : start + CHUNK] for start in range(0, len(raw), CHUNK))

    def reopened(self, fresh: Mapping[Path, Reader]) -> SumSource:
        """Return the same tensor in files that were opened anew."""
        return SumSource(self.base.reopened(fresh), self.difference.reopened(fresh), self.scale)


AnySource: TypeAlias = Source | SumSource
"""Where a tensor is read from."""


def same_bytes(one: memoryview, other: memoryview) -> bool:
    """Return whether two pieces of memory of one length have the same bytes.

    Two memoryviews are compared byte by byte in Python's own loop, which takes ten times as long.
    """
    words = len(one) & -8
    return np.array_equal(
        np.frombuffer(one[:words], np.uint64), np.frombuffer(other[:words], np.uint64)
    ) and bool(one[words:] == other[words:])


def are_equal(one: AnySource, other: AnySource) -> bool:
    """Return whether two tensors have one shape, one dtype and the same bytes."""
    if one.tensor != other.tensor:
        return False
    return all(itertools.starmap(same_bytes, zip(one.chunks(), other.chunks(), strict=True)))


def _check_names(path: Path, names: dict[str, _Entry]) -> None:
    odd = next((name for name in names if not name.isprintable()), None)
    if odd is not None:
        raise CheckpointError(f"{path}: the name of a tensor must be printable, got {odd!r}")
    longest = max(map(len, names), default=0)
    if longest > _NAME_LIMIT:
        raise CheckpointError(
            f"{path}: the name of a tensor must have at most {_NAME_LIMIT} characters, "
            f"got {longest}"
        )


def _checked_header(path: Path) -> tuple[dict[str, object], Stamp, bytes]:
    """Return the header, the stamp of the file, and the bytes before the data."""
    if path.suffix.lower() == ".gguf":
        raise gguf(path)
    if path.suffix in _PICKLES:
        raise CheckpointError(
            f"{path}: a pickle file can run any code when it is read, so doraxp does not read it. "
            f"Convert it on a machine where you trust it: {_conversion(path)}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with opened(path) as file:
        stamp, first = settled_stamp_of(file), read_up_to(file, 8)
        if first.startswith(_GGUF):
            raise gguf(path)
        if first == _LFS:
            raise CheckpointError(
                f"{path}: this is a pointer of Git LFS without the weights: run `git lfs pull`"
            )
        length = int.from_bytes(first, "little")
        if length > SIZE_LIMIT:
            raise CheckpointError(
                f"{path}: not a safetensors file: its header must have at most {SIZE_LIMIT} "
                f"bytes, got {length}"
            )
        raw = read_up_to(file, length)
        check_values(raw, path)
        try:
            with safe_open(path, framework="numpy"):
                pass
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a safetensors file: {error}") from None
    check_stamps({path: stamp})  # the library opened it by its name
    return parse_json(raw, path), stamp, first + raw


def _conversion(path: Path) -> str:
    """Return the Python code that writes the tensors of a pickle where programs look for them."""
    if "-of-" in path.name:  # a shard, whose index must be written too
        return (
            f"transformers.AutoModelForCausalLM.from_pretrained('{path.parent}')"
            f".save_pretrained('{path.parent}-safetensors'), or the class of that model"
        )
    stem = "model" if path.stem == "pytorch_model" else path.stem
    return (
        "safetensors.torch.save_file({name: x.contiguous().clone() for name, x in "
        f"torch.load('{path}', weights_only=True).items()}}, "
        f"'{path.with_name(f'{stem}.safetensors')}', {{'format': 'pt'}})"
    )


def _digest(raw: bytes) -> bytes:
    return hashlib.blake2b(raw, digest_size=16).digest()
