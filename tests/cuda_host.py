"""An emulated CUDA device: a C++ compiler builds the kernels' own source, and NumPy multiplies.

`HostCuda` has the methods of `doraxp.backends._cupy.device.Cuda`. Its arrays are NumPy's.
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

from doraxp.backends._cupy.arrays import layout
from doraxp.backends._cupy.parameters import kernel_name, packer, parameters_of
from doraxp.backends._cupy.signatures import KERNELS
from doraxp.backends._cupy.source import BUILDS, SOURCE, THREADS, Types

GRID = (2**31 - 1, 65535, 65535)
HALF = ("float16", "bfloat16")
GEMMS = {
    *((name, name, name) for name in (*HALF, "float32", "float64")),
    *((name, name, "float32") for name in HALF),
}
"""The dtypes of left, right and result that cuBLAS's gemmEx accepts."""
CODES = {"index_t": "q", "int": "i", "float32": "f", "float64": "d"}
"""The codes of cuda_host.hpp for numbers."""
HEADER = Path(__file__).with_name("cuda_host.hpp")


class DeviceArray(np.ndarray):
    """An array that raises if its values are read inside `forbid_reading`."""

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
    """Compile the kernels for a set of types, once in each process."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    launchers = "".join(f"DORAXP_LAUNCHER({name})\n" for name in KERNELS)
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder, "host.cpp"), Path(folder, "host.so")
        source.write_text(f'#include "{HEADER}"\n{SOURCE}\n{launchers}', encoding="utf-8")
        # As on a GPU, an access that is not aligned to its width ends the process.
        aligned = ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
        flags = ["-O1", "-ffp-contract=off", "-shared", "-fPIC", *aligned, *types.options()]
        command = [compiler, *flags, str(source), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return ctypes.CDLL(str(built))


class HostCuda:
    """Launches and products on the host. `launched` lists the kernels, in order."""

    def __init__(self) -> None:
        self.launched: list[str] = []

    def empty(self, shape: Sequence[int], dtype: Any) -> Any:
        """Return an array of NaN: a number that a kernel forgets to write then shows up."""
        array = np.empty(tuple(shape), dtype)
        array.reshape(-1).view(np.uint8)[...] = 0xFF
        return array.view(DeviceArray)

    def pointer(self, array: Any) -> int:
        return array.ctypes.data

    def upload(self, values: Any) -> Any:
        return values.copy().view(DeviceArray)

    def launch(
        self, arguments: tuple[Any, ...], types: Types, grid: tuple[int, int, int],
        *, threads: int = THREADS,
    ) -> None:  # fmt: skip
        name = kernel_name(type(arguments))
        assert all(0 < size <= limit for size, limit in zip(grid, GRID, strict=True)), (name, grid)
        assert types in BUILDS, types
        self.launched.append(name)
        check_arguments(arguments, types)
        values = packer(type(arguments), types)(arguments)
        held = [_argument(value) for value in values]
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


def check_arguments(arguments: tuple[Any, ...], types: Types) -> None:
    """Compare the arguments of a launch with the declaration, and that with the compiled kernel."""
    declared = parameters_of(type(arguments))
    name = kernel_name(type(arguments))
    codes = "".join(_code(each.c_type, types) for each in declared)
    compiled = getattr(library(types), f"signature_{name}")
    compiled.restype = ctypes.c_char_p
    assert compiled().decode() == codes, f"{name} takes {compiled().decode()}, declared {codes}"
    for each, value in zip(declared, arguments, strict=True):
        what = f"argument {each.name} of {name} is of {each.c_type}"
        if value is None:
            assert each.nullable, f"{what}, got None"
        elif not each.c_type.endswith("*"):
            number = float if each.c_type == "compute_t" else int
            assert isinstance(value, number | np.number), f"{what}, got {type(value)}"
            assert number is float or not isinstance(value, float), f"{what}, got {value}"
        else:
            assert isinstance(value, np.ndarray), f"{what}, got {type(value)}"
            allowed = _dtypes(each.c_type, types)
            assert str(value.dtype) in allowed, f"{what}, got {value.dtype}, not {allowed}"


def _code(c_type: str, types: Types) -> str:
    if c_type.endswith("*"):
        return "P"
    return CODES[types.compute if c_type == "compute_t" else c_type]


def _dtypes(c_type: str, types: Types) -> tuple[str, ...]:
    """Return the dtypes of the arrays that a pointer may point to."""
    return {
        "storage_t*": (types.storage,),
        "product_t*": (types.product,),
        "compute_t*": (types.compute,),
        "void*": (types.storage, types.compute),
        "unsigned char*": ("bool", "uint8"),
        "int*": ("int32",),
        "Tile*": ("uint32",),
        "Leaf*": ("uint8",),
    }[c_type.removeprefix("const ")]


def _argument(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        assert value.flags.c_contiguous or value.base is not None
        return ctypes.c_void_p(value.ctypes.data)
    return np.ctypeslib.as_ctypes_type(value.dtype)(value)
