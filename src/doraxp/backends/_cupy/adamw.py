"""AdamW on NVIDIA GPUs: one launch for up to 36 leaves of one compute dtype."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate, starmap

from doraxp._base.types import AdamWLeaves, AdamWNumbers, AdamWStepped, DType, Namespace
from doraxp.backends._cupy.arrays import DeviceArray, dtype_name, packed, together
from doraxp.backends._cupy.device import Cuda
from doraxp.backends._cupy.parameters import LEAF, LEAVES
from doraxp.backends._cupy.signatures import Adamw
from doraxp.backends._cupy.source import THREADS, Types, blocks

LEAF_BLOCK = 4 * THREADS
"""Numbers of a leaf that a block updates. kernels/adamw.cu has the same."""
KINDS = ("float16", "bfloat16", "float32", "float64")
"""The numbers 0 to 3 stand for these dtypes in a leaf."""


def adamw(
    cuda: Cuda, xp: Namespace, leaves: AdamWLeaves, rates: Sequence[float],
    decays: Sequence[float], numbers: AdamWNumbers, *, donate: bool,
) -> AdamWStepped:  # fmt: skip
    """Return p, mu and nu after a step. float64 leaves take a launch of their own."""
    dtypes = [mean.dtype for mean in leaves.mu]
    if len(set(dtypes)) == 1:
        return _step(cuda, xp, leaves, rates, decays, numbers, donate=donate)
    stepped: list[tuple[DeviceArray, ...]] = [()] * len(dtypes)
    for wide in set(dtypes):
        places = [place for place, dtype in enumerate(dtypes) if dtype == wide]
        group = AdamWLeaves(*([column[place] for place in places] for column in leaves))
        rate, decay = ([column[place] for place in places] for column in (rates, decays))
        new = _step(cuda, xp, group, rate, decay, numbers, donate=donate)
        for place, arrays in zip(places, zip(*new, strict=True), strict=True):
            stepped[place] = arrays
    return AdamWStepped(*zip(*stepped, strict=True))


def _step(
    cuda: Cuda, xp: Namespace, leaves: AdamWLeaves, rates: Sequence[float],
    decays: Sequence[float], numbers: AdamWNumbers, *, donate: bool,
) -> AdamWStepped:  # fmt: skip
    """Step leaves of one compute dtype."""
    if not all(map(cuda.in_c_order, leaves)):
        leaves = AdamWLeaves(*([packed(array, xp) for array in column] for column in leaves))
    wide: DType = leaves.mu[0].dtype
    old = list(map(cuda.addresses, leaves))
    if donate:
        new, addresses = (
            AdamWStepped(leaves.params, leaves.mu, leaves.nu),
            [*old, *old[:1], *old[2:]],
        )
    else:
        new = _like(cuda, leaves)
        addresses = [*old, *map(cuda.addresses, new)]
    params: list[DeviceArray] = [*leaves.params]
    sizes = tuple([p.size for p in params])
    kinds = [_kinds([array.dtype for array in column]) for column in (params, leaves.grads)]
    types = Types(*[dtype_name(wide)] * 3)
    for start in range(0, len(params), LEAVES):
        part = slice(start, start + LEAVES)
        firsts, total = _first_blocks(sizes[part])
        columns = *addresses, sizes, kinds[0], kinds[1], rates, decays
        *before, p_kinds, g_kinds, eta, decay = (column[part] for column in columns)
        rows = zip(*before, firsts, p_kinds, g_kinds, eta, decay, strict=True)
        if total:
            _launch(cuda, b"".join(starmap(LEAF.pack, rows)), len(firsts), numbers, types, total)
    return new


def _like(cuda: Cuda, leaves: AdamWLeaves) -> AdamWStepped:
    """Return arrays for the results: the moments in one allocation, the parameters in another.

    So parameters that the caller keeps do not keep their moments.
    """
    shapes = [p.shape for p in leaves.params]
    kind = leaves.mu[0].dtype
    moments = cuda.empties(together(*[(shape, kind) for shape in shapes * 2]))
    params = cuda.empties(together(*[(p.shape, p.dtype) for p in leaves.params]))
    return AdamWStepped(params, moments[: len(shapes)], moments[len(shapes) :])


def _launch(
    cuda: Cuda, table: bytes, count: int, numbers: AdamWNumbers, types: Types, total: int
) -> None:
    """Step the leaves of a table by blocks of this total."""
    arguments = Adamw(
        leaves=table, leaf_count=count, beta1=numbers.beta1, rest1=numbers.rest1,
        beta2=numbers.beta2, rest2=numbers.rest2, eps=numbers.eps,
        correct1=float(numbers.correction1), correct2=float(numbers.correction2),
    )  # fmt: skip
    cuda.launch(arguments, types, (total, 1, 1))


@functools.lru_cache(maxsize=64)
def _first_blocks(sizes: tuple[int, ...]) -> tuple[list[int], int]:
    """Return the first block of each leaf, and the number of blocks."""
    *firsts, total = accumulate((blocks(size, LEAF_BLOCK) for size in sizes), initial=0)
    return firsts, total


def _kinds(dtypes: list[DType]) -> list[int]:
    """Return the number of each dtype. Most often all are one."""
    first, count = dtypes[0], len(dtypes)
    if dtypes.count(first) == count:
        return [_kind(first)] * count
    return list(map(_kind, dtypes))


@functools.cache
def _kind(dtype: DType) -> int:
    return KINDS.index(dtype_name(dtype))
