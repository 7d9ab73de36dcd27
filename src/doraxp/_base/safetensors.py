"""The header of a safetensors file that is written as a stream; it needs no library."""

from __future__ import annotations

import json
from typing import Any, BinaryIO, NamedTuple


class Tensor(NamedTuple):
    """A tensor as the header describes it."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def write_header(file: BinaryIO, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write the header of a file whose tensors follow in this order."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, (dtype, shape, nbytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)  # the data starts at a multiple of 8
    file.write(len(raw).to_bytes(8, "little") + raw)
