"""The last `doraxp.Prepared` of each frozen weight, for the next forwards.

W (*stack, out, in)   ‖w‖² (*stack, out)

Where a weight is found unchanged, its ‖w‖² is used again. Where the adapter is unchanged too, so is
all else. The adapter is compared by value, number for number, and the weight by a sample.
"""

from __future__ import annotations

import functools
import math
from collections.abc import MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from doraxp._base.types import Adapter, Config
from doraxp._core.prepared import Prepared, prepare_checked
from doraxp.backends import Operations
from doraxp.torch._modes import is_fake

RELEASED = torch.empty(0)
"""Stands for the weight in what is kept."""
_GOLDEN = (math.sqrt(5) - 1) / 2


class _State(NamedTuple):
    """Equal while a tensor has the same memory and no write that PyTorch counts."""

    storage: Any  # a weak reference; while it exists, no other storage gets its address
    offset: Any
    stride: tuple[int, ...]
    version: int


class _Kept(NamedTuple):
    state: _State
    sampled: Tensor
    prepared: Prepared  # with `RELEASED` for the weight, which may then be freed


_kept: MutableMapping[Tensor, _Kept] = WeakTensorKeyDictionary()


def recall(
    weight: Tensor, adapter: Adapter, config: Config, matrix: Tensor | None = None,
    *, ops: Operations,
) -> tuple[Prepared | None, Prepared | None]:  # fmt: skip
    """Return the kept `prepared` and `previous`, the arguments of `doraxp.forward`.

    The first is of this adapter and config, the second of others: one of them is None. `matrix` is
    the weight as the matrix that DoRA adapts, where it is stored in another way.
    """
    kept = _kept.get(weight) if may_keep(weight) else None
    if kept is None or kept.state != _state(weight):
        return None, None
    if not torch.equal(kept.sampled, sample(_rows(weight, matrix))):
        return None, None
    last = with_weight(kept.prepared, (weight if matrix is None else matrix).detach())
    if last.config == config and ops.unchanged(last.snapshot, last.adapter, adapter):
        return last, None
    return None, last


def prepare_kept(
    weight: Tensor, adapter: Adapter, config: Config, dtype: Any, *, matrix: Tensor | None = None,
    ops: Operations,
) -> Prepared:  # fmt: skip
    """Return the result of `doraxp.prepare`: the kept one, or one that is kept from now on.

    The arguments have been checked, and the adapter is outside of autograd's graph.
    """
    prepared, previous = recall(weight, adapter, config, matrix, ops=ops)
    if prepared is None:
        base: Any = (weight if matrix is None else matrix).detach()
        prepared = prepare_checked(base, adapter, config, previous, None, dtype, ops=ops)
        keep(weight, prepared, matrix)
    return prepared


def keep(weight: Tensor, prepared: Prepared, matrix: Tensor | None = None) -> None:
    """Keep what a forward has prepared, if the next one can tell whether the weight has changed."""
    if may_keep(weight):
        released = with_weight(prepared, RELEASED)
        sampled = sample(_rows(weight, matrix)).clone()
        _kept[weight] = _Kept(_state(weight), sampled, released)


def _rows(weight: Tensor, matrix: Tensor | None) -> Tensor:
    """Return a weight for `sample`: one that is not stored as its matrix with two axes."""
    return weight if matrix is None else weight.flatten(1)


def with_weight(prepared: Prepared, weight: Tensor) -> Prepared:
    """Return `prepared` with another tensor for W."""
    return prepared._replace(direction=prepared.direction.with_weight(weight))


def may_keep(weight: Tensor) -> bool:
    """Return whether a later call can tell if the weight has changed.

    A weight that is trained changes at each step. An inference tensor does not count its writes. On
    a GPU, a look at the sample would wait for the queue. Where tensors are fake, the sample has no
    values.
    """
    if weight.requires_grad or weight.is_inference() or weight.device.type != "cpu" or is_fake():
        return False
    contiguous: bool = weight.is_contiguous()
    return contiguous


def _state(tensor: Tensor) -> _State:
    reference: Any = StorageWeakRef  # PyTorch gives it no type
    storage = reference(tensor.untyped_storage())
    return _State(storage, tensor.storage_offset(), tensor.stride(), tensor._version)


def sample(weight: Tensor, every: int = 1) -> Tensor:
    """Return some numbers of W as a view, at equal distances: at least one of each row and column.

    With another `every`, there are so many times fewer, spread over rows and columns.

    The version of a tensor does not count writes through `.data`, through a NumPy view, or by FSDP
    into its buffers. Such writes change whole matrices, or large parts of them.
    """
    size, columns = weight.numel(), weight.shape[-1]
    step = _step(size // columns, columns, every)
    return weight.detach().as_strided((-(-size // step),), (step,), weight.storage_offset())


@functools.lru_cache
def _step(rows: int, columns: int, every: int) -> int:
    """Return the distance of the numbers of a sample.

    A distance of at most the length of a row leaves no row out. One that has no divisor in common
    with that length goes through all columns before it comes back to one. And multiples of the
    golden ratio, modulo 1, leave no large gap.
    """
    step = max(1, round((every - 1 + _GOLDEN) * min(rows, columns)))
    while math.gcd(step, columns) > 1:
        step -= 1
    return step
