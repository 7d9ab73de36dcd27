"""safetensors files from strangers: a checked header, reads by rows, and writes as a stream.

The library checks a header and maps the file; a map of a whole model counts as memory, and it
writes only what it is given whole. So it checks here, and the bytes are read and written plainly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from doraxp._base.safetensors import Tensor
from doraxp._base.types import Array

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Those that are computed with; the others are only copied."""
# Far above what the largest models need, and little memory to parse.
_HEADER_LIMIT, _VALUES_LIMIT = 16 << 20, 250_000
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_LFS = b"version "
Empty = Callable[[tuple[int, ...], np.dtype[Any]], Array]
"""As `np.empty`."""
CHUNK = 4 << 20
"""Bytes that are copied at a time."""


_NAME_LIMIT, _ERROR_LIMIT = 500, 1000


class CheckpointError(ValueError):
    """A file that cannot be used, and why: one line, whatever the names and values in the file."""

    def __init__(self, message: str) -> None:
        line = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in message)
        if len(line) > _ERROR_LIMIT:
            line = f"{line[: _ERROR_LIMIT - 40]}… of {len(line)} letters"
        super().__init__(line)


class Reader:
    """An open safetensors file, of which nothing but the header is in memory.

    Parameters
    ----------
    path : Path

    Raises
    ------
    CheckpointError
        The header is not what the format demands.
    OSError
        The file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        header, self._data = _checked_header(path)
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        odd = next((name for name in header if not name.isprintable()), None)
        if odd is not None:
            raise CheckpointError(f"{path}: the name of a tensor must be printable, got {odd!r}")
        longest = max(map(len, header), default=0)
        if longest > _NAME_LIMIT:
            raise CheckpointError(
                f"{path}: the name of a tensor must have at most {_NAME_LIMIT} characters, "
                f"got {longest}"
            )
        entries = sorted(header.items(), key=lambda entry: entry[1]["data_offsets"])
        self.tensors: dict[str, Tensor] = {}
        """In the order of the file."""
        self._starts: dict[str, int] = {}
        for name, entry in entries:
            start, stop = entry["data_offsets"]
            self.tensors[name] = Tensor(entry["dtype"], tuple(entry["shape"]), stop - start)
            self._starts[name] = start

    def read(self, name: str, rows: slice | None = None, empty: Empty = np.empty) -> Array:
        """Return a tensor, or some of its rows, of one of `DTYPES`, in what `empty` gives."""
        tensor = self.tensors[name]
        dtype, shape, offset = DTYPES[tensor.dtype], tensor.shape, 0
        if rows is not None:
            shape = (rows.stop - rows.start, *shape[1:])
            offset = rows.start * math.prod(shape[1:]) * dtype.itemsize
        array = empty(shape, dtype)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._data + self._starts[name] + offset)
            _fill(file, array.reshape(-1).view(np.uint8).data, self.path)
        return array

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of a tensor of any dtype, in one buffer: use it before the next."""
        left = self.tensors[name].nbytes
        buffer = memoryview(bytearray(min(left, CHUNK)))
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._data + self._starts[name])
            while left:
                chunk = buffer[: min(left, CHUNK)]
                _fill(file, chunk, self.path)
                left -= len(chunk)
                yield chunk


def _fill(file: Any, buffer: memoryview, path: Path) -> None:
    while buffer:
        count = file.readinto(buffer)
        if not count:
            raise CheckpointError(f"{path}: the file became shorter while it was read")
        buffer = buffer[count:]


def _checked_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header, and where the data starts."""
    if path.suffix in _PICKLES:
        raise CheckpointError(
            f"{path}: a pickle file can run any code when it is read, so it is not: convert it "
            "where you trust it, by safetensors.torch.save_file(torch.load(path, "
            f"weights_only=True), '{path.stem}.safetensors')"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        first = file.read(8)
        if first == _LFS:
            raise CheckpointError(
                f"{path}: a pointer of Git LFS, and no weights: run `git lfs pull`"
            )
        length = int.from_bytes(first, "little")
        if length > _HEADER_LIMIT:
            raise CheckpointError(
                f"{path}: no safetensors file: its header must be at most {_HEADER_LIMIT} bytes, "
                f"got {length}"
            )
        raw = file.read(length)
    check_values(raw, path)
    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise CheckpointError(f"{path}: no safetensors file: {error}") from None
    return parse_json(raw, path), 8 + length


def check_values(raw: bytes, path: Path) -> None:
    """Refuse JSON of so many values that it would fill the memory."""
    if sum(raw.count(sign) for sign in (b",", b"[", b"{")) > _VALUES_LIMIT:
        raise CheckpointError(f"{path}: JSON must have at most {_VALUES_LIMIT} values")


def parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    """Return a JSON object; a name that stands in it twice is an error."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{path}: the name {twice!r} stands in it twice")
        return entries

    try:
        value = json.loads(raw, object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must be a JSON object, got {type(value).__name__}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    size = path.stat().st_size
    if size > _HEADER_LIMIT:
        raise CheckpointError(f"{path}: must be at most {_HEADER_LIMIT} bytes, got {size}")
    raw = path.read_bytes()
    check_values(raw, path)
    return parse_json(raw, path)
