"""The audit of a weight that an adapter should have been merged into.

W  before the merge     W'  the merge that doraxp computes     S  the weight that the file has
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from doraxp._base.types import Adapter
from doraxp.checkpoint._engine import Engine, Reused
from doraxp.checkpoint._options import Options, merge_dtype
from doraxp.checkpoint._plan import MergedTensor
from doraxp.checkpoint._rows import Block, merged_blocks, row_blocks
from doraxp.checkpoint._safetensors import DTYPES, Source
from doraxp.checkpoint._shard import OnBytes
from doraxp.checkpoint._suspects import PRECISION, Sample, Slack, Wide, diagnose, over
from doraxp.layers import AdaptedLayer
from doraxp.testing import right_merge, wrong_merges_across_rows

KEPT_IN_PART, _KEPT = "kept in part", 0.9
"""The verdict on a right merge that has less than this part of the update."""
_SLABS, _ROWS, _NUMBERS = 16, 16, 1 << 17
"""A sample has 16 groups of rows: at least 16 rows, and more where they are short."""
_IDLE = 1e-6
"""The relative change of a row that the rounding of m to float32 may cause without training."""
_INFINITY = {"F64": 0x7FF0 << 48, "F32": 0x7F80 << 16, "F16": 0x7C00, "BF16": 0x7F80}
"""The bits of infinity. Those of NaN are larger."""


class Verdict(NamedTuple):
    """The result of the audit of one tensor."""

    verdict: str
    """"exact", "rounded", "equal" or "converted", or the fault in words."""
    right: bool
    """Whether the tensor is as it should be."""
    detail: str = ""
    """The figures that support the verdict; empty where it needs none."""
    kept: float | None = None
    """⟨S − W, W' − W⟩ / ‖W' − W‖² on a sample of rows. None where nothing should be merged, or
    where S is not a merge of this adapter."""
    error: float | None = None
    """The largest abs(S − W'), in units of the largest error that a right merge may have; 0 where S
    is bit for bit the merge that doraxp writes. None where nothing should be merged."""


class _Compared(NamedTuple):
    """The result of one pass over S and W'."""

    differ: int
    """Numbers that are not bit for bit those that doraxp writes."""
    wrong: int
    """Numbers whose error is larger than that of a right merge."""
    worst: float
    """The largest error, in units of its bound."""
    infinite: int
    """Numbers that are NaN or infinity."""
    norm: Wide
    """n, (out,)."""


def audit_weight(
    name: str,
    task: MergedTensor,
    stored: Source,
    layer: AdaptedLayer,
    engine: Engine,
    on_bytes: OnBytes,
) -> Verdict:
    """Return the verdict on a weight.

    Parameters
    ----------
    name : str
        The weight's name in the base.
    task : MergedTensor
    stored : Source
        S.
    layer : AdaptedLayer
        The adapter, read.
    engine : Engine
    on_bytes : callable
        Called with numbers of bytes of W that were audited.
    """
    before, after = task.source.tensor, stored.tensor
    suspect = _Suspect(name, task, stored, layer, engine)
    if before.shape != after.shape:
        on_bytes(before.nbytes)
        if before.shape == after.shape[::-1] and suspect.is_flipped():
            return Verdict("transposed", False, f"{after.shape} for {before.shape}")
        return Verdict("another shape", False, f"{after.shape} for {before.shape}")
    found = _compare(suspect, on_bytes)
    if found.infinite:
        return suspect.infinite(found)
    sample = suspect.sample()
    if found.differ:
        fault = suspect.fault(sample, found)
        if fault is not None:
            return fault
    kept = _kept(sample)
    if kept < _KEPT:
        detail = f"rounding left {kept:.2g} of the update"
        return Verdict(KEPT_IN_PART, False, detail, kept, found.worst)
    return Verdict("rounded" if found.differ else "exact", True, "", kept, found.worst)


def adapted_norms(name: str, task: MergedTensor, layer: AdaptedLayer, engine: Engine) -> Wide:
    """Return n of all rows."""
    dtype = merge_dtype(task.source.tensor, task.source.tensor, Options())
    blocks = merged_blocks(name, task.source, layer, engine, dtype)
    return np.concatenate([np.array(block.norms.adapted, np.float64) for block in blocks])


def _compare(suspect: _Suspect, on_bytes: OnBytes) -> _Compared:
    """Compare S with W' block by block."""
    tensor, transposed = suspect.stored.tensor, suspect.layer.kind.is_transposed
    dtype, memory, narrow = DTYPES[tensor.dtype], Reused(), Reused()
    slack = Slack(suspect.layer, tensor.dtype)
    differ = wrong = infinite = 0
    worst, norms = 0.0, []
    nbytes = suspect.task.source.tensor.nbytes // tensor.shape[0]
    for block in suspect.blocks():
        norms.append(np.array(block.norms.adapted, np.float64))
        with np.errstate(over="ignore"):
            ours = narrow.cast(block.merged, dtype)
        theirs = suspect.stored.read(block.rows, memory).reshape(ours.shape)
        bits = theirs.view(f"u{dtype.itemsize}")
        infinite += _count_infinite(bits, _INFINITY[tensor.dtype])
        other = bits != ours.view(bits.dtype)
        if other.any():
            differ += int(np.count_nonzero(other))
            hit = np.flatnonzero(other.any(axis=1))  # rows of the file
            merged, found = block.merged[hit], theirs[hit].astype(block.merged.dtype)
            rows, columns = hit + block.rows.start, slice(None)
            norm = norms[-1]
            if transposed:
                merged, found = merged.T, found.T
                rows, columns, norm = slice(None), rows, norms[0]
            else:
                norm = norm[hit]
            bound = slack.bound(np.abs(merged), rows, norm, columns)
            with np.errstate(invalid="ignore"):
                found -= merged
                share = np.abs(found, out=found)
                share /= bound
            wrong += int(np.count_nonzero(~(share <= 1)))
            worst = max(worst, float(np.max(share)))
        on_bytes(nbytes * len(theirs))
    return _Compared(differ, wrong, worst, infinite, np.concatenate(norms))


def _count_infinite(bits: NDArray[np.unsignedinteger], infinity: int) -> int:
    """Return how many numbers are NaN or infinity, from their bits."""
    sign = 1 << (8 * bits.itemsize - 1)
    # Of the numbers of one sign these have the largest bits, so this is faster than isfinite.
    if bits.view(f"i{bits.itemsize}").max(initial=0) < infinity and bits.max(
        initial=0
    ) < bits.dtype.type(sign | infinity):
        return 0
    return int(np.count_nonzero((bits & bits.dtype.type(sign - 1)) >= bits.dtype.type(infinity)))


class _Suspect:
    """A weight to look at again."""

    def __init__(
        self, name: str, task: MergedTensor, stored: Source, layer: AdaptedLayer, engine: Engine
    ) -> None:
        self.name, self.task, self.stored, self.layer = name, task, stored, layer
        self._engine = engine
        self._dtype = merge_dtype(task.source.tensor, stored.tensor, Options())
        self._out, self._inner = layer.kind.matrix_shape(layer.shape)

    def blocks(self) -> Iterator[Block]:
        """Yield W' as doraxp computes it."""
        return merged_blocks(self.name, self.task.source, self.layer, self._engine, self._dtype)

    def infinite(self, found: _Compared) -> Verdict:
        """Return the verdict on a weight with NaN or infinity."""
        zero = int(np.count_nonzero(found.norm == 0))
        detail = f"{found.infinite:,} numbers"
        if zero and found.infinite == zero * self._inner:
            detail += f": the {zero} rows whose norm n is 0, where W' is 0"
        return Verdict("NaN or infinity", False, detail, None, found.worst)

    def sample(self) -> Sample:
        """Return groups of rows that are evenly spaced, the first and the last row included."""
        size = min(self._out, max(_ROWS, _NUMBERS // self._inner))
        slab = -(-size // _SLABS)
        starts = np.linspace(0, max(0, self._out - slab), _SLABS).astype(int).tolist()
        rows = np.unique([row for start in starts for row in range(start, start + slab)])
        rows = rows[rows < self._out]
        a, b, m = (np.asarray(leaf, np.float64) for leaf in self.layer.adapter)
        base, stored = (
            _matrix_rows(one, rows, self.layer) for one in (self.task.source, self.stored)
        )
        return Sample(
            rows,
            base,
            stored,
            Adapter(a, b[rows], m[rows]),
            self.layer.config,
            self.stored.tensor.dtype,
        )

    def fault(self, sample: Sample, found: _Compared) -> Verdict | None:
        """Return the fault that S has; None if it is a right merge to rounding errors."""
        norm = found.norm[sample.rows]
        merged = right_merge(sample.base, sample.adapter, sample.config)
        bound = Slack(self.layer, self.stored.tensor.dtype).bound(np.abs(merged), sample.rows, norm)
        diagnosis = diagnose(sample, bound)
        is_idle = _is_idle(sample, merged)
        if not found.wrong and (is_idle or not diagnosis.refuted):
            return None
        if np.array_equal(sample.stored, sample.base) and self._is_unchanged():
            return Verdict("unchanged", False, "the merge did nothing", None, found.worst)
        if (diagnosis.fits or is_idle) and not diagnosis.refuted:
            detail = f"{found.wrong:,} of {self._out * self._inner:,} numbers"
            return Verdict("damaged", False, detail, None, found.worst)
        names = diagnosis.names
        if not names and self._out == self._inner:
            names = diagnose(sample, bound, self._across_rows(sample)).names
            if not names and self.is_flipped():
                names = ("transposed",)
        if names:
            return Verdict(" or ".join(names), False, "", None, found.worst)
        return Verdict("another adapter", False, _distances(sample, merged), None, found.worst)

    def _is_unchanged(self) -> bool:
        """Return True if S is W, converted where the dtypes differ."""
        dtype = DTYPES[self.stored.tensor.dtype]
        with np.errstate(over="ignore"):
            return all(
                self.task.source.read(rows).astype(dtype).tobytes()
                == self.stored.read(rows).tobytes()
                for rows in row_blocks(self.layer.shape)
            )

    def _across_rows(self, sample: Sample) -> Iterator[tuple[str, Wide]]:
        """Yield the wrong merges in which a row depends on the other rows."""
        a, b, m = (np.asarray(leaf, np.float64) for leaf in self.layer.adapter)
        b = self.layer.config.scaling * b
        by_row, by_column = np.zeros(self._out), np.zeros(self._inner)
        for rows in row_blocks(self.layer.shape):
            weight = self.task.source.read(rows).astype(np.float64)
            v = weight.reshape(len(weight), -1)
            if self.layer.kind.is_transposed:
                v += (b @ a[:, rows]).T
                by_column[rows] = np.sum(v * v, axis=1)
                by_row += np.sum(v * v, axis=0)
            else:
                v += b[rows] @ a
                by_row[rows] = np.sum(v * v, axis=1)
                by_column += np.sum(v * v, axis=0)
        v = sample.base + b[sample.rows] @ a
        yield from wrong_merges_across_rows(v, sample.rows, m, np.sqrt(by_row), np.sqrt(by_column))

    def is_flipped(self) -> bool:
        """Return True if S is the transpose of W', as W is stored."""
        shape = self.stored.tensor.shape
        if len(shape) != 2:
            return False
        rows = np.unique(np.linspace(0, shape[0] - 1, _SLABS).astype(int))
        theirs = [self.stored.read(slice(row, row + 1))[0] for row in rows.tolist()]
        ours = np.concatenate([block.merged[:, rows] for block in self.blocks()]).T
        found = np.asarray(theirs).astype(np.float64)
        epsilon = PRECISION[self.stored.tensor.dtype][0]
        return bool(np.linalg.norm(found - ours) <= 4 * epsilon * np.linalg.norm(ours))


def _distances(sample: Sample, merged: Wide) -> str:
    """Return how far S is from W' and from W, and how far its norms are from m, in words."""
    with np.errstate(over="ignore"):  # S may hold any numbers
        update, moved = merged - sample.base, sample.stored - sample.base
        length, m = np.linalg.norm(sample.stored, axis=1), np.abs(np.asarray(sample.adapter[2]))
        off = np.max(np.abs(over(length, m) - 1))
        return (
            f"‖S − W'‖ is {_ratio(sample.stored - merged, update):.3g} and ‖S − W‖ "
            f"{_ratio(moved, update):.3g} of ‖W' − W‖; rows differ from m by up to {off:.2g} m"
        )


def _ratio(one: Wide, other: Wide) -> float:
    length = float(np.linalg.norm(other))
    return float(np.linalg.norm(one)) / length if length else np.inf


def _is_idle(sample: Sample, merged: Wide) -> bool:
    """Return whether W' differs from W by the rounding of m alone, as before training."""
    length = np.linalg.norm(merged - sample.base, axis=1)
    return bool((length <= _IDLE * np.linalg.norm(sample.base, axis=1)).all())


def _kept(sample: Sample) -> float:
    """Return the part of the update that S has; 1 if the update is zero."""
    merged = right_merge(sample.base, sample.adapter, sample.config)
    if _is_idle(sample, merged):
        return 1.0
    update = merged - sample.base
    return float(np.vdot(sample.stored - sample.base, update) / np.vdot(update, update))


def _matrix_rows(source: Source, rows: NDArray[np.intp], layer: AdaptedLayer) -> Wide:
    """Return some rows of the matrix of a stored weight, in float64."""
    if layer.kind.is_transposed:
        parts = [source.read(block)[:, rows] for block in row_blocks(layer.shape)]
        return np.concatenate(parts).astype(np.float64).T
    ends = np.flatnonzero(np.diff(rows, append=rows[-1] + 2) > 1) + 1
    parts = [
        source.read(slice(int(part[0]), int(part[-1]) + 1)).reshape(len(part), -1)
        for part in np.split(rows, ends[:-1])
    ]
    return np.concatenate(parts).astype(np.float64)
