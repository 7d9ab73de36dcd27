"""The library that computes a merge, and memory that is used again."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from doraxp._base.types import HostArray

EngineArray: TypeAlias = Any
"""An array of the engine's library."""


class Reused:
    """Allocates as `np.empty` does, in one piece of memory: each array overwrites the one before.

    Fresh memory costs a page fault for every 4 KiB, which takes longer than the arithmetic.
    """

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> HostArray:
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > self._memory.size:
            self._memory = np.empty(nbytes, np.uint8)
        return self._memory[:nbytes].view(dtype).reshape(shape)

    def cast(self, array: HostArray, dtype: np.dtype[np.generic]) -> HostArray:
        """Return `array` in `dtype`: itself if it has it, else a copy in this memory."""
        if array.dtype == dtype:
            return array
        result = self(array.shape, dtype)
        np.copyto(result, array, casting="unsafe")
        return result


class Engine(NamedTuple):
    """The place where products are computed, and the way there and back.

    A result of `product` or `fetch` may be overwritten by the next one.
    """

    place: Callable[[HostArray], EngineArray]
    """Takes an array of NumPy to the engine."""
    product: Callable[[EngineArray, EngineArray], EngineArray]
    """Multiplies two matrices there."""
    fetch: Callable[[EngineArray], HostArray]
    """Brings an array back."""
    raises: bool = False
    """Whether a number that overflows raises FloatingPointError. It does with NumPy alone, within
    `np.errstate`; the other libraries go on with infinity."""


def load_engine(backend: str) -> Engine:
    """Return the engine of "numpy", "torch" or "cupy"; use it in one thread only."""
    if backend == "torch":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        return Engine(
            lambda x: torch.asarray(x, device=device), operator.matmul, lambda x: x.cpu().numpy()
        )
    if backend == "cupy":
        import cupy

        return Engine(cupy.asarray, operator.matmul, cupy.asnumpy)
    empty = Reused()

    def product(left: EngineArray, right: EngineArray) -> EngineArray:
        out = empty((left.shape[0], right.shape[1]), left.dtype)
        return np.matmul(left, right, out=out)

    return Engine(lambda x: x, product, lambda x: x, raises=True)
