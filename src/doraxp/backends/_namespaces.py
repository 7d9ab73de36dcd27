"""The array namespace and the device of an array: those of array-api-compat, and ours for MLX."""

from __future__ import annotations

import functools
import importlib

import array_api_compat

from doraxp._base.types import Array, Namespace


def array_namespace(array: Array) -> Namespace:
    """Return the namespace of the library of `array`.

    Raises
    ------
    TypeError
        array-api-compat does not know the library.
    """
    xp: Namespace = _mlx() if _is_of_mlx(array) else array_api_compat.array_namespace(array)
    return xp


def device(array: Array) -> object:
    """Return the device of `array`; None where it has none: a traced array of JAX, one of MLX."""
    found: object = None if _is_of_mlx(array) else array_api_compat.device(array)
    return found


def _is_of_mlx(array: Array) -> bool:
    return array.__class__.__module__ == "mlx.core"


@functools.cache
def _mlx() -> Namespace:
    namespace: Namespace = importlib.import_module("doraxp.backends._mlx")
    return namespace
