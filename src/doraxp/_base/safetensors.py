"""The header of a safetensors file: the entry of a tensor, and the bytes before the data.

This module needs no library, because `doraxp.testing` writes such files without the extras.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import BinaryIO, NamedTuple


class Tensor(NamedTuple):
    """The entry of one tensor in the header."""

    dtype: str
    """The name that the format uses: "F32", "BF16"."""
    shape: tuple[int, ...]
    nbytes: int


def write_header(
    file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write the header of a file; the caller then writes the tensors' bytes in the same order."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, (dtype, shape, nbytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)  # the data must start at a multiple of 8
    file.write(len(raw).to_bytes(8, "little") + raw)
