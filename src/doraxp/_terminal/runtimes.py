"""How to make the arrays of a library, compile functions for it and wait for their results."""

from __future__ import annotations

import contextlib
import functools
import importlib
import platform
from collections.abc import Callable
from typing import Any, NamedTuple

import doraxp
from doraxp._base.types import Array

BACKENDS = ("numpy", "torch", "jax", "cupy")


class Runtime(NamedTuple):
    """How one array library runs functions of arrays."""

    name: str
    asarray: Callable[[Array], Array]
    """Turns a NumPy array into an array of the library."""
    compiled: Callable[[Callable[..., Any]], Callable[..., Any]]
    """Compiles a function of arrays if the library has a compiler; else returns it unchanged."""
    wait: Callable[[Any], Any]
    """Waits until its argument is computed, and returns it."""


def runtime(name: str) -> Runtime:
    """Import a library, one of `BACKENDS`, and return its runtime."""
    module = importlib.import_module(name)
    if name == "jax":  # a step has hundreds of operations: one by one they take 20 times as long
        with contextlib.suppress(ValueError):  # registered before
            module.tree_util.register_static(doraxp.Config)
        asarray = importlib.import_module("jax.numpy").asarray
        return Runtime(name, asarray, module.jit, module.block_until_ready)
    if name == "cupy":
        return Runtime(name, module.asarray, _unchanged, _wait_for_cupy)
    if name == "torch":
        return Runtime(name, functools.partial(_tensor, module), _unchanged, _unchanged)
    return Runtime(name, module.asarray, _unchanged, _unchanged)


def versions(*names: str) -> dict[str, str]:
    """Return the versions of doraxp, Python and the named modules."""
    modules = {name: str(importlib.import_module(name).__version__) for name in names}
    return {"doraxp": doraxp.__version__, "python": platform.python_version(), **modules}


def _tensor(torch: Any, array: Any) -> Any:
    if array.dtype.name == "bfloat16":  # PyTorch does not know the dtype of ml_dtypes
        return torch.asarray(array.view("int16")).view(torch.bfloat16)
    return torch.asarray(array)


def _unchanged(value: Any) -> Any:
    return value


def _wait_for_cupy(value: Any) -> Any:
    importlib.import_module("cupy").cuda.get_current_stream().synchronize()
    return value
