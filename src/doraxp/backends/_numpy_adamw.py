"""AdamW on NumPy's arrays by blocks, with the operations of `Operations.adamw` in their order.

    p  parameter    g  gradient    mu, nu  running means of g and g²    η  rate    λ  decay

A block is read from memory once, and all operations on it run in the cache. The results have the
same bits as without blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from doraxp._base.types import AdamWLeaves, AdamWNumbers, AdamWStepped

# Bytes of a block of one array; the two buffers take twice as much. Smaller blocks take longer,
# because each of the 16 operations on a block costs about 1 µs of Python's time.
BLOCK = 1 << 18

NumpyArray: TypeAlias = Any
"""An `np.ndarray`."""


def adamw(
    leaves: AdamWLeaves, rates: Sequence[float], decays: Sequence[float], numbers: AdamWNumbers,
    *, donate: bool,
) -> AdamWStepped:  # fmt: skip
    """Return p, mu and nu; with `donate` in the given arrays, where these can be written to."""
    corrections = float(numbers.correction1), float(numbers.correction2)  # 0-d where t was traced
    numbers = AdamWNumbers(*numbers[:5], *corrections)
    buffer = np.empty((2, 0), np.float32)
    stepped = []
    for p, g, mu, nu, rate, decay in zip(*leaves, rates, decays, strict=True):
        results = [_result(each, donate=donate) for each in (p, mu, nu)]
        for block in _blocks([*results, p, g, mu, nu]):
            wide = block[1]
            if buffer.shape[1] < wide.size or buffer.dtype != wide.dtype:
                buffer = np.empty((2, wide.size), wide.dtype)
            pair = buffer[:, : wide.size].reshape(2, *wide.shape)
            _step(block, *pair, rate=rate, decay=decay, numbers=numbers)
        stepped.append(results)
    return AdamWStepped(*zip(*stepped, strict=True))


def _result(given: NumpyArray, *, donate: bool) -> NumpyArray:
    """Return the array that a result is written into."""
    return given if donate and given.flags.writeable else np.empty(given.shape, given.dtype)


def _blocks(arrays: list[NumpyArray]) -> Iterator[list[NumpyArray]]:
    """Yield the parts of arrays of one shape: whole rows, if an array is not in C order."""
    wide = arrays[1]
    if wide.nbytes <= BLOCK and wide.ndim:
        yield arrays
        return
    if all(array.flags.c_contiguous for array in arrays):
        arrays = [array.reshape(-1) for array in arrays]
    rows = len(arrays[0])
    step = max(1, BLOCK * rows // wide.nbytes)
    for start in range(0, rows, step):
        yield [array[start : start + step] for array in arrays]


def _step(
    block: list[NumpyArray], one: NumpyArray, other: NumpyArray,
    *, rate: float, decay: float, numbers: AdamWNumbers,
) -> None:  # fmt: skip
    """Write p, mu and nu of a block into its first three arrays, given p, g, mu and nu."""
    new_p, new_mu, new_nu, p, g, mu, nu = block
    beta1, rest1, beta2, rest2, eps, *corrections = numbers
    correction1: NumpyArray
    correction2: NumpyArray
    correction1, correction2 = corrections
    if not p.dtype == g.dtype == mu.dtype:
        p, g = (array.astype(mu.dtype, copy=False) for array in (p, g))
    np.multiply(rest1, g, out=one)
    np.multiply(beta1, mu, out=new_mu)
    new_mu += one
    np.multiply(g, g, out=one)
    one *= rest2
    np.multiply(beta2, nu, out=new_nu)
    new_nu += one
    np.divide(new_nu, correction2, out=one)
    np.sqrt(one, out=one)
    one += eps
    np.divide(new_mu, correction1, out=other)
    other /= one
    np.multiply(decay, p, out=one)
    other += one
    other *= rate
    np.subtract(p, other, out=new_p, casting="unsafe")  # p is rounded to its dtype here
