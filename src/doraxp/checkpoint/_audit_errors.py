"""The errors of S, the weight that a file has, against W', the merge that doraxp computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

from doraxp._base.types import HostArray
from doraxp._core.kinds import LayerKind
from doraxp.checkpoint._audit_sample import Dtypes
from doraxp.checkpoint._engine import Reused
from doraxp.checkpoint._matrix import as_matrix
from doraxp.checkpoint._precision import (
    PRECISION,
    Precision,
    coarsest,
    count_infinite,
    with_epsilon,
)
from doraxp.checkpoint._rows import Block
from doraxp.checkpoint._safetensors import DTYPES, Source
from doraxp.checkpoint._slack import Places, Wide

DAMAGED = 0.01
"""The part of the numbers that may be far off in a weight that is merged right, but damaged."""
_FAR = 16.0
"""Damaged numbers are so many bounds off. A rounding to a coarser dtype has no such few numbers."""


class Compared(NamedTuple):
    """The result of one pass over S and W'."""

    differ: int
    """Numbers that are not bit for bit those that doraxp writes."""
    infinite: int
    """Numbers that are NaN or infinity."""
    norm: Wide
    """n, (out,)."""
    wrong: int
    """Numbers whose error is larger than that of a right merge."""
    worst: float
    """The largest error, in units of its bound."""


class Bound(Protocol):
    """The largest error of a right merge, as `Slack` has it."""

    def bound(
        self, size: HostArray, rows: Places, norm: Wide, columns: Places = slice(None)
    ) -> HostArray:
        """Return the bound for a part of the matrix."""


class _Errors:
    """The errors of S, in units of one bound."""

    def __init__(self, slack: Bound) -> None:
        self._slack = slack
        self.wrong, self.worst = 0, 0.0

    def add(
        self, difference: HostArray, size: HostArray, rows: Places, norm: Wide, columns: Places
    ) -> None:
        """Count some numbers, by abs(S − W') and the arguments of `Slack.bound`."""
        bound = self._slack.bound(size, rows, norm, columns)
        with np.errstate(invalid="ignore"):
            np.divide(difference, bound, out=bound)
        self.wrong += int(np.count_nonzero(~(bound <= 1)))
        self.worst = max(self.worst, float(np.max(bound)))


def compare(
    blocks: Iterator[Block],
    stored: Source,
    kind: LayerKind,
    dtypes: Dtypes,
    slack: Callable[[Precision], Bound],
    on_rows: Callable[[int], None],
) -> Compared:
    """Compare S with W' block by block.

    Where W, A, B or m have a coarser dtype than S, the bound of the coarser one counts, if S needs
    it. It does not if few numbers are beyond the finer bound, and far beyond it: they are damaged.

    Parameters
    ----------
    blocks : iterator of Block
        W'.
    stored : Source
        S.
    kind : LayerKind
        Its rows have the norms of W'.
    dtypes : Dtypes
    slack : callable
        Returns the largest error of a right merge whose steps have a precision.
    on_rows : callable
        Called with numbers of rows of the file that were compared.
    """
    dtype, shape = DTYPES[stored.tensor.dtype], stored.tensor.shape
    kernel = math.prod(shape[2:]) if kind.is_transposed else 1
    memory, narrow = Reused(), Reused()
    steps = coarsest(dtypes)
    # Numbers that underflow are few and may be far off, but are not damaged.
    last = with_epsilon(steps, PRECISION[dtypes.stored].epsilon)
    bounds = [_Errors(slack(precision)) for precision in dict.fromkeys((last, steps))]
    differ = infinite = count = 0
    norms: list[Wide] = []
    for block in blocks:
        norms.append(np.array(block.norms.adapted, np.float64))
        with np.errstate(over="ignore"):
            ours = narrow.cast(block.merged, dtype)
        theirs = stored.read(block.rows, memory).reshape(ours.shape)
        count += theirs.size
        infinite += count_infinite(theirs)
        bits = theirs.view(f"u{dtype.itemsize}")
        other = bits != ours.view(bits.dtype)
        if other.any():
            differ += int(np.count_nonzero(other))
            hit = np.flatnonzero(other.any(axis=1))  # rows of the file
            merged, found = block.merged[hit], theirs[hit].astype(block.merged.dtype)
            rows, columns, norm = hit + block.rows.start, slice(None), norms[-1]
            if kind.is_transposed:
                merged, found = (as_matrix(one, kind, shape) for one in (merged, found))
                columns = (rows[:, None] * kernel + np.arange(kernel)).ravel()
                rows, norm = slice(None), norms[0]
            else:
                norm = norm[hit]
            with np.errstate(invalid="ignore"):
                found -= merged
            difference, size = np.abs(found, out=found), np.abs(merged)
            for errors in bounds:
                errors.add(difference, size, rows, norm, columns)
        on_rows(len(theirs))
    fine, coarse = bounds[0], bounds[-1]
    is_damage = 0 < fine.wrong <= DAMAGED * count and fine.worst > _FAR
    errors = fine if is_damage or not fine.wrong else coarse
    return Compared(differ, infinite, np.concatenate(norms), errors.wrong, errors.worst)
