"""AdamW on NVIDIA GPUs: one launch for all leaves of one compute dtype."""

from __future__ import annotations

import numpy as np

from doraxp._base.types import AdamWLeaf, AdamWNumbers, DType, Namespace
from doraxp.backends._cupy.arrays import DeviceArray, name_of, packed
from doraxp.backends._cupy.device import Cuda
from doraxp.backends._cupy.signatures import Adamw
from doraxp.backends._cupy.source import THREADS, Types, blocks

LEAF_BLOCK = 4 * THREADS
"""Numbers of a leaf that a block updates. kernels/adamw.cu has the same."""
KINDS = ("float16", "bfloat16", "float32", "float64")
"""The numbers 0 to 3 stand for these dtypes in a leaf."""
LEAF = np.dtype(
    [(name, np.uint64) for name in ("p", "g", "mu", "nu", "new_p", "new_mu", "new_nu")]
    + [(name, np.int64) for name in ("size", "first_block", "p_type", "g_type")]
    + [(name, np.float64) for name in ("rate", "decay")]
)
"""`Leaf` of kernels/adamw.cu."""


def adamw(
    cuda: Cuda, xp: Namespace, leaves: dict[str, AdamWLeaf], rates: dict[str, float],
    decays: dict[str, float], numbers: AdamWNumbers,
) -> dict[str, tuple[DeviceArray, DeviceArray, DeviceArray]]:  # fmt: skip
    """Return p, mu and nu by path after a step. float64 leaves take a launch of their own."""
    stepped: dict[str, tuple[DeviceArray, DeviceArray, DeviceArray]] = {}
    for wide in (np.dtype(np.float32), np.dtype(np.float64)):
        group = {path: leaf for path, leaf in leaves.items() if leaf.mu.dtype == wide}
        if group:
            stepped |= _step(cuda, xp, group, rates, decays, numbers, wide)
    return stepped


def _step(
    cuda: Cuda, xp: Namespace, leaves: dict[str, AdamWLeaf], rates: dict[str, float],
    decays: dict[str, float], numbers: AdamWNumbers, wide: DType,
) -> dict[str, tuple[DeviceArray, DeviceArray, DeviceArray]]:  # fmt: skip
    first_block, held = 0, []
    stepped: dict[str, tuple[DeviceArray, DeviceArray, DeviceArray]] = {}
    table = np.zeros(len(leaves), LEAF)
    for row, (path, arrays) in enumerate(leaves.items()):
        p, g, *moments = (packed(array, xp) for array in arrays)
        new = [cuda.empty(p.shape, dtype) for dtype in (p.dtype, wide, wide)]
        pointers = (cuda.pointer(array) for array in (p, g, *moments, *new))
        codes = (KINDS.index(name_of(array)) for array in (p, g))
        table[row] = (*pointers, p.size, first_block, *codes, rates[path], decays[path])
        first_block += blocks(p.size, LEAF_BLOCK)
        held.append((p, g, *moments))  # the launch needs their memory
        stepped[path] = (new[0], new[1], new[2])
    if first_block:
        arguments = Adamw(
            leaves=cuda.upload(table.view(np.uint8)), leaf_count=len(leaves), beta1=numbers.beta1,
            rest1=numbers.rest1, beta2=numbers.beta2, rest2=numbers.rest2, eps=numbers.eps,
            correct1=float(numbers.correction1), correct2=float(numbers.correction2),
        )  # fmt: skip
        cuda.launch(arguments, Types(*[wide.name] * 3), (first_block, 1, 1))
    return stepped
