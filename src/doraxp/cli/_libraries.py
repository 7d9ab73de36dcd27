"""How the commands make a library's arrays, compile its functions and wait for its results."""

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


class Library(NamedTuple):
    """An array library, as the commands use it."""

    name: str
    asarray: Callable[[Array], Array]
    """Takes an array of NumPy's over."""
    compiled: Callable[[Callable[..., Any]], Callable[..., Any]]
    """Compiles a function of arrays, where the library has a compiler that pays."""
    wait: Callable[[Any], Any]
    """Returns its argument when that is computed."""


def library(name: str) -> Library:
    """Import one of `BACKENDS`."""
    module = importlib.import_module(name)
    if name == "jax":  # a step has hundreds of operations: one by one they take 20 times as long
        with contextlib.suppress(ValueError):  # registered before
            module.tree_util.register_static(doraxp.Config)
        asarray = importlib.import_module("jax.numpy").asarray
        return Library(name, asarray, module.jit, module.block_until_ready)
    if name == "cupy":
        return Library(name, module.asarray, _as_it_is, _wait_for_cupy)
    if name == "torch":
        return Library(name, functools.partial(_tensor, module), _as_it_is, _as_it_is)
    return Library(name, module.asarray, _as_it_is, _as_it_is)


def versions(*names: str) -> dict[str, str]:
    """Return the versions of doraxp, Python and modules."""
    modules = {name: str(importlib.import_module(name).__version__) for name in names}
    return {"doraxp": doraxp.__version__, "python": platform.python_version(), **modules}


def _tensor(torch: Any, array: Array) -> Array:
    if array.dtype.name == "bfloat16":  # that of ml_dtypes, which PyTorch does not know
        return torch.asarray(array.view("int16")).view(torch.bfloat16)
    return torch.asarray(array)


def _as_it_is(value: Any) -> Any:
    return value


def _wait_for_cupy(value: Any) -> Any:
    importlib.import_module("cupy").cuda.get_current_stream().synchronize()
    return value
