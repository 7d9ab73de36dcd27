"""A CUDA device made of a C++ compiler and NumPy: the kernels' own source, run on the host.

`HostCuda` has the methods of `doraxp.backends._cupy.device.Cuda`. Arrays are NumPy's.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from doraxp.backends._cupy.device import BUILDS, KERNELS, SOURCE, THREADS, Types, layout

GRID = (2**31 - 1, 65535, 65535)
HALF = ("float16", "bfloat16")
GEMMS = {
    *((name, name, name) for name in (*HALF, "float32", "float64")),
    *((name, name, "float32") for name in HALF),
}
"""What cuBLAS's gemmEx takes, of that which is asked here: left, right, result."""
HEADER = Path(__file__).with_name("cuda_host.hpp")


class DeviceArray(np.ndarray):
    """An array whose values may not be read on the host while that is forbidden."""

    readable = True

    def _refuse(self, *_: Any) -> Any:
        assert DeviceArray.readable, "a value was read on the host: that waits for the queue"

    def __bool__(self) -> bool:
        return self._refuse() or bool(np.asarray(self))

    def __float__(self) -> float:
        return self._refuse() or float(np.asarray(self))

    def __int__(self) -> int:
        return self._refuse() or int(np.asarray(self))

    def __index__(self) -> int:
        return self._refuse() or np.asarray(self).__index__()

    def item(self, *args: Any) -> Any:
        return self._refuse() or super().item(*args)

    def tolist(self) -> Any:
        return self._refuse() or super().tolist()


@contextlib.contextmanager
def forbid_reading() -> Iterator[None]:
    DeviceArray.readable = False
    try:
        yield
    finally:
        DeviceArray.readable = True


@functools.cache
def library(types: Types) -> ctypes.CDLL:
    """Compile the kernels for three types, once per process."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    launchers = "".join(f"DORAXP_LAUNCHER({name})\n" for name in KERNELS)
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder, "host.cpp"), Path(folder, "host.so")
        source.write_text(f'#include "{HEADER}"\n{SOURCE}\n{launchers}', encoding="utf-8")
        flags = ["-O1", "-ffp-contract=off", "-shared", "-fPIC", *types.options()]
        command = [compiler, *flags, str(source), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(built))


class HostCuda:
    """Launches and products on the host. `launched` lists the kernels, in order."""

    def __init__(self) -> None:
        self.launched: list[str] = []

    def empty(self, shape: Sequence[int], dtype: Any) -> Any:
        """Return an array of NaN: what a kernel forgets to write is seen."""
        array = np.empty(tuple(shape), dtype)
        array.reshape(-1).view(np.uint8)[...] = 0xFF
        return array.view(DeviceArray)

    def pointer(self, array: Any) -> int:
        return array.ctypes.data

    def upload(self, values: Any) -> Any:
        return values.copy().view(DeviceArray)

    def launch(
        self, name: str, types: Types, grid: tuple[int, int, int], *arguments: Any,
        threads: int = THREADS,
    ) -> None:  # fmt: skip
        assert all(0 < size <= limit for size, limit in zip(grid, GRID, strict=True)), (name, grid)
        assert types in BUILDS, types
        self.launched.append(name)
        codes = getattr(library(types), f"signature_{name}")
        codes.restype = ctypes.c_char_p
        given = "".join(map(_code, arguments))
        assert given == codes().decode(), f"{name} takes {codes().decode()}, got {given}"
        held = [_argument(value) for value in arguments]
        pointers = (ctypes.c_void_p * len(held))(*map(ctypes.addressof, held))
        getattr(library(types), f"launch_{name}")(*grid, threads, pointers)

    def gemm(
        self, left: Any, right: Any, out: Any, beta: float | Any, *, tf32: bool = False
    ) -> None:
        self.launched.append("tf32" if tf32 else "gemm")
        names = str(left.dtype), str(right.dtype), str(out.dtype)
        assert names in GEMMS, names
        assert out.flags.c_contiguous
        assert left.shape[1] == right.shape[0]
        assert out.shape == (left.shape[0], right.shape[1])
        layout(left), layout(right)
        wide = np.float64 if left.dtype == np.float64 else np.float32
        left, right, result = (np.asarray(array) for array in (left, right, out))
        beta = beta if isinstance(beta, float) else float(np.asarray(beta)[1])
        product = left.astype(wide) @ right.astype(wide)
        result[...] = (product if beta == 0 else product + beta * result.astype(wide)).astype(
            out.dtype
        )


def _code(value: Any) -> str:
    return (
        "P"
        if value is None or isinstance(value, np.ndarray)
        else value.dtype.char.replace("l", "q")
    )


def _argument(value: Any) -> Any:
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, np.ndarray):
        assert value.flags.c_contiguous or value.base is not None
        return ctypes.c_void_p(value.ctypes.data)
    return np.ctypeslib.as_ctypes_type(value.dtype)(value)
