"""Make arrays of a library in a storage dtype on a device, and read them back."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import array_api_compat
import numpy as np

from doraxp._base.types import Array, Namespace
from doraxp.backends import compute_dtype, operations
from doraxp.testing._rounding import Precision

# The module that makes arrays of each library that `doraxp.backends.available` lists.
MODULES = {
    "numpy": "numpy",
    "cupy": "cupy",
    "torch": "torch",
    "jax": "jax.numpy",
    "dask": "dask.array",
    "array_api_strict": "array_api_strict",
}
DEVICES = ("cpu", "cuda")
ALONE = {"cupy": "cuda", "numpy": "cpu", "dask": "cpu", "array_api_strict": "cpu"}
"""The device of each library that computes on one kind of device alone."""


class Library:
    """An array library, by its name in `doraxp.backends.available`.

    Parameters
    ----------
    name : str
    device : {"cpu", "cuda"}, optional
        Where its arrays are: the first CUDA device, or CuPy's current one. By default they are
        where the library puts them itself.

    Raises
    ------
    ValueError
        `name` is not one of these libraries, or it never computes on this kind of device.
    RuntimeError
        The library has no such device here.
    """

    def __init__(self, name: str, device: str | None = None) -> None:
        if name not in MODULES:
            raise ValueError(f"name must be one of {', '.join(MODULES)}, got {name!r}")
        if device is not None:
            check_device(name, device)
        self.name = name
        self.device = device
        self.module = importlib.import_module(MODULES[name])

    @property
    def label(self) -> str:
        """The name, with the device if one was asked for: `torch on cuda`."""
        return self.name if self.device is None else f"{self.name} on {self.device}"

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Enter the context in which the library computes.

        Products of float32 are whole, without TF32, which JAX uses on a GPU by default. float64 is
        enabled in JAX.
        """
        with contextlib.ExitStack() as stack:
            if self.name == "jax":
                jax = importlib.import_module("jax")
                # Otherwise JAX makes float32 of float64 without a warning.
                stack.enter_context(jax.enable_x64(True))
                stack.enter_context(jax.default_matmul_precision("highest"))
            if self.name == "torch" and self.device == "cuda":
                matmul = self.module.backends.cuda.matmul
                stack.callback(setattr, matmul, "fp32_precision", matmul.fp32_precision)
                matmul.fp32_precision = "ieee"
            yield

    def dtype(self, name: str) -> Any:
        """Return the library's dtype of a name; None if the library does not have it."""
        if (own := getattr(self.module, name, None)) is not None:
            return own
        if name == "float16" and self.name == "dask":
            return np.dtype(name)
        if name == "bfloat16" and self.name in ("numpy", "cupy"):
            with contextlib.suppress(ImportError):
                return np.dtype(importlib.import_module("ml_dtypes").bfloat16)
        return None

    def precision(self, dtype: str) -> Precision:
        """Return the precision in which the library computes layers stored in a dtype.

        Parameters
        ----------
        dtype : str
            The dtype of x, dy and the weight. The library must have it.

        Returns
        -------
        {"exact", "mixed"}
            For the argument of `expected` with the same name. "mixed" for float16 and bfloat16 on
            CuPy and PyTorch, outside of `doraxp.backends.exact_products`. On a CPU that does not
            multiply such numbers itself, PyTorch is "exact"; on a CUDA device it is "mixed".

        Examples
        --------
        >>> Library("numpy").precision("float16")
        'exact'
        """
        with self.active():
            weight = self.module.zeros((1, 1), dtype=self.dtype(dtype), **self._placed())
            ops = operations(weight=weight)
            wide = compute_dtype(weight, xp=ops.xp)
            # Only mixed precision rounds the product of x and a dropout mask.
            taken = ops.operand_dtype(weight, weight, wide, masked=True)
        return "exact" if taken == wide else "mixed"

    def asarray(self, values: Any, dtype: str) -> Array:
        """Return values of NumPy as a new array of this library, in a dtype given by name."""
        array = self.module.asarray(np.array(values), **self._placed())
        xp: Namespace = array_api_compat.array_namespace(array)
        return xp.astype(array, self.dtype(dtype), copy=False)

    def _placed(self) -> dict[str, Any]:
        """Return the argument that makes an array on the device."""
        if self.device is None or self.name in ALONE:
            return {}
        if self.name == "torch":
            return {"device": self.device}
        return {"device": importlib.import_module("jax").devices(self.device)[0]}


def check_kind_of_device(name: str, device: str) -> None:
    """Raise ValueError unless a library computes on a kind of device anywhere."""
    if device not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
    if ALONE.get(name, device) != device:
        raise ValueError(f"device must be {ALONE[name]} for {name}, got {device!r}")


def check_device(name: str, device: str) -> None:
    """Raise ValueError or RuntimeError unless a library computes on a kind of device here."""
    check_kind_of_device(name, device)
    if device == "cpu" or name == "cupy":  # a CuPy that is usable has a device
        return
    module = importlib.import_module(name)
    if name == "torch":
        found = module.cuda.is_available()
    else:
        try:
            found = bool(module.devices(device))
        except RuntimeError:  # JAX knows no such platform here
            found = False
    if not found:
        raise RuntimeError(
            f"{name} cannot run on cuda here: it finds no device: install its build for CUDA, and "
            "look for the device with nvidia-smi"
        )


def dtype_name(array: Array) -> str:
    """Return the name of an array's dtype without the name of its library."""
    return str(array.dtype).rpartition(".")[-1]


def as_numpy(array: Array) -> Any:
    """Return the values as a NumPy array on the host; float16 and bfloat16 become float32."""
    xp = array_api_compat.array_namespace(array)
    if dtype_name(array) in ("float16", "bfloat16"):
        array = xp.astype(array, xp.float32)
    for name in ("get", "cpu"):  # of CuPy and of PyTorch
        copied: Callable[[], Any] | None = getattr(array, name, None)
        array = array if copied is None else copied()
    return np.asarray(array)
