"""The source of the kernels, and the dtypes that it is compiled for."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

FILES = (
    "common",
    "skinny",
    "adapter",
    "suspects",
    "forward",
    "backward",
    "token",
    "norm",
    "parts",
    "merge",
    "adamw",
    "unpack",
)
"""The files of `kernels/`, in the order in which one source is made of them."""
SOURCE = "\n".join(
    Path(__file__).with_name("kernels").joinpath(f"{name}.cu").read_text(encoding="utf-8")
    for name in FILES
)
THREADS = 128
"""Threads of a block, where a launch does not give another number. The kernels have the same."""
WARP, WARPS = 32, THREADS // 32
"""Threads of a warp, and warps of a block."""
LIMIT = 65535
"""The most blocks along a grid's y and z."""
_C_TYPES = {"float16": "half_t", "bfloat16": "bf16_t", "float32": "float", "float64": "double"}


class Types(NamedTuple):
    """The dtypes, by name, that the compiler puts for the three types of the source."""

    storage: str
    """`storage_t`: the weight, x, dy and y."""
    product: str
    """`product_t`: z and dz."""
    compute: str
    """`compute_t`: all other arrays."""

    def options(self) -> tuple[str, ...]:
        """Return the options for NVRTC or for another compiler."""
        defined = (f"-D{field}_t={_C_TYPES[name]}" for field, name in self._asdict().items())
        return ("-std=c++17", *defined)


BUILDS = (
    Types("bfloat16", "float32", "float32"),
    Types("bfloat16", "bfloat16", "float32"),
    Types("float16", "float32", "float32"),
    Types("float16", "float16", "float32"),
    Types("float32", "float32", "float32"),
    Types("float64", "float64", "float64"),
    Types("bfloat16", "float64", "float64"),
    Types("float16", "float64", "float64"),
    Types("float32", "float64", "float64"),
)
"""All combinations that the operations launch kernels with."""


def blocks(count: int, each: int) -> int:
    """Return how many blocks of `each` cover `count`."""
    return -(-count // each)
