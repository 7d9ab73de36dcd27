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
from types import SimpleNamespace
from typing import Any

import numpy as np

from doraxp.backends._cupy.arrays import Together, in_c_order, layout
from doraxp.backends._cupy.parameters import LEAF, LEAVES, Arguments, kernel_name, parameters_of
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
FOR_SUSPECT_ROWS = {
    "outputs": ("weight", "x"),
    "update": ("weight", "d", "x"),
    "gradient_a": ("weight", "d", "x"),
    "expanded_norm": ("weight",),
    "norms": ("weight",),
}
"""The large arrays that a kernel reads only for suspect rows."""
HEADER = Path(__file__).with_name("cuda_host.hpp")


class DeviceArray(np.ndarray):
    """An array that raises if its values are read inside `forbid_reading`."""

    readable = True

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Return arrays of this class, as CuPy's functions do: `concatenate` and `where` too."""
        result = super().__array_function__(func, types, args, kwargs)
        return result.view(DeviceArray) if type(result) is np.ndarray else result

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
    """Launches and products on the host.

    `launched` lists the kernels, in order. `moved` lists the bytes of the 16-bit arrays of each. An
    array counts once, twice if a product is added to it, and not at all if the kernel reads it only
    for suspect rows.
    """

    cache = 2**20
    """Bytes of the L2 cache."""

    def __init__(self) -> None:
        self.launched: list[str] = []
        self.moved: list[int] = []

    def empty(self, shape: Sequence[int], dtype: Any) -> Any:
        """Return an array of NaN: a number that a kernel forgets to write then shows up."""
        array = np.empty(tuple(shape), dtype)
        array.reshape(-1).view(np.uint8)[...] = 0xFF
        return array.view(DeviceArray)

    def empties(self, together: Together) -> list[Any]:
        return [each and self.empty(each.shape, each.kind) for each in together.places]

    def cache_bytes(self) -> int:
        return self.cache

    def addresses(self, arrays: Sequence[Any]) -> list[int]:
        return [array.ctypes.data for array in arrays]

    def in_c_order(self, arrays: Sequence[Any]) -> bool:
        return all(in_c_order(array) for array in arrays)

    def launch(
        self, arguments: tuple[Any, ...], types: Types, grid: tuple[int, int, int],
        *, threads: int = THREADS,
    ) -> None:  # fmt: skip
        name = kernel_name(type(arguments))
        assert all(0 < size <= limit for size, limit in zip(grid, GRID, strict=True)), (name, grid)
        assert types in BUILDS, types
        self.launched.append(name)
        given = zip(type(arguments)._fields, arguments, strict=True)
        rare = FOR_SUSPECT_ROWS.get(name, ())
        arrays = {
            id(each): each.nbytes for field, each in given
            if field not in rare and isinstance(each, np.ndarray) and each.itemsize == 2
        }  # fmt: skip
        self.moved.append(sum(arrays.values()))
        check_arguments(arguments, types)
        memory = Arguments(type(arguments), types)
        memory.store(tuple(map(_addressed, arguments)))
        getattr(library(types), f"launch_{name}")(*grid, threads, ctypes.c_void_p(memory.address))

    def gemm(self, left: Any, right: Any, out: Any, beta: float, *, tf32: bool = False) -> None:
        self.launched.append("tf32" if tf32 else "gemm")
        arrays = [left, right, out, *([out] if beta != 0 else [])]
        self.moved.append(sum(array.nbytes for array in arrays if array.itemsize == 2))
        names = str(left.dtype), str(right.dtype), str(out.dtype)
        assert names in GEMMS, names
        assert out.flags.c_contiguous
        assert left.shape[1] == right.shape[0]
        assert out.shape == (left.shape[0], right.shape[1])
        layout(left), layout(right)
        wide = np.float64 if left.dtype == np.float64 else np.float32
        left, right, result = (np.asarray(array) for array in (left, right, out))
        if tf32 and left.dtype == np.float32:
            left, right = rounded_to_tf32(left), rounded_to_tf32(right)
        product = left.astype(wide) @ right.astype(wide)
        result[...] = (product if beta == 0 else product + beta * result.astype(wide)).astype(
            out.dtype
        )


def rounded_to_tf32(array: np.ndarray) -> np.ndarray:
    """Round float32 to TF32, which has 10 bits after the leading one; ties to even."""
    bits = np.ascontiguousarray(array).view(np.uint32)
    half_to_even = 0xFFF + (bits >> 13 & 1)
    return ((bits + half_to_even) & 0xFFFFE000).astype(np.uint32).view(np.float32)


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
        elif each.c_type == "Leaves":
            assert isinstance(value, bytes), f"{what}, got {type(value)}"
            assert len(value) <= LEAVES * LEAF.size, f"{what}, got {len(value)} bytes"
        elif not each.is_array:
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
    if c_type == "Leaves":
        return "s"
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
    }[c_type.removeprefix("const ")]


def _addressed(value: Any) -> Any:
    """Return an argument as the device's code expects it: an array has its address as CuPy's do."""
    if not isinstance(value, np.ndarray):
        return value
    assert value.flags.c_contiguous or value.base is not None
    return SimpleNamespace(data=SimpleNamespace(ptr=value.ctypes.data))
