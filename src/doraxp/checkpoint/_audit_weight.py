"""The audit of a weight that an adapter should have been merged into.

W  before the merge     W'  the merge that doraxp computes     S  the weight that the file has
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from doraxp._base.words import counted
from doraxp._core.updates import LowRank
from doraxp.checkpoint._audit_errors import Compared, compare
from doraxp.checkpoint._audit_parts import Part
from doraxp.checkpoint._audit_sample import SLABS, Sample, take_sample
from doraxp.checkpoint._change import IDLE, KEPT
from doraxp.checkpoint._engine import Engine
from doraxp.checkpoint._formulas import diagnose
from doraxp.checkpoint._matrix import row_blocks
from doraxp.checkpoint._options import Options, merge_dtype
from doraxp.checkpoint._precision import PRECISION, coarsest
from doraxp.checkpoint._rows import Block, Term, merged_blocks
from doraxp.checkpoint._safetensors import DTYPES, Source
from doraxp.checkpoint._shard import OnBytes
from doraxp.checkpoint._slack import Slack, Wide, over
from doraxp.checkpoint._tasks import MergedTensor
from doraxp.checkpoint._updated_layer import UpdatedLayer
from doraxp.testing import right_merge, wrong_merges_across_rows

KEPT_IN_PART, INFINITE = "kept in part", "NaN or infinity"


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


def audit_weight(
    name: str,
    task: MergedTensor,
    stored: Source,
    layer: UpdatedLayer,
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
    layer : UpdatedLayer
        The adapter, read.
    engine : Engine
    on_bytes : callable
        Called with numbers of bytes of W that were audited.
    """
    before, after = task.source.tensor, stored.tensor
    weight = _WeightAudit(name, task, stored, layer, engine)
    if before.shape != after.shape:
        on_bytes(before.nbytes)
        if before.shape == after.shape[::-1] and weight.is_flipped():
            return Verdict("transposed", False, f"{after.shape} for {before.shape}")
        return Verdict("another shape", False, f"{after.shape} for {before.shape}")
    sample, row_bytes = take_sample(task.source, stored, layer), before.nbytes // before.shape[0]
    found = compare(
        weight.blocks(),
        stored,
        layer.rows_kind,
        sample.dtypes,
        partial(Slack, layer),
        lambda count: on_bytes(row_bytes * count),
    )
    if found.infinite:
        return weight.infinite(found)
    fault = weight.fault(sample, found) if found.differ else None
    if fault is not None:
        return fault
    kept = _kept(sample)
    if kept < KEPT:
        detail = f"rounding left {kept:.2g} of the update"
        return Verdict(KEPT_IN_PART, False, detail, kept, found.worst)
    return Verdict("rounded" if found.differ else "exact", True, "", kept, found.worst)


def adapted_norms(name: str, task: MergedTensor, layer: UpdatedLayer, engine: Engine) -> Wide:
    """Return n of all rows."""
    dtype = merge_dtype(task.source.tensor, task.source.tensor, Options())
    blocks = merged_blocks(name, task.source, (Term(layer),), engine, dtype)
    return np.concatenate([np.array(block.norms.adapted, np.float64) for block in blocks])


class _WeightAudit:
    """A weight, and the merge that it should be."""

    def __init__(
        self, name: str, task: MergedTensor, stored: Source, layer: UpdatedLayer, engine: Engine
    ) -> None:
        self.name, self.task, self.stored, self.layer = name, task, stored, layer
        self._engine = engine
        self._dtype = merge_dtype(task.source.tensor, stored.tensor, Options())
        self._out, self._inner = layer.rows_kind.matrix_shape(layer.shape)

    def blocks(self) -> Iterator[Block]:
        """Yield W' as doraxp computes it."""
        terms = (Term(self.layer),)
        return merged_blocks(self.name, self.task.source, terms, self._engine, self._dtype)

    def infinite(self, found: Compared) -> Verdict:
        """Return the verdict on a weight with NaN or infinity."""
        zero = int(np.count_nonzero(found.norm == 0))
        detail = counted(found.infinite, "number")
        if zero and found.infinite == zero * self._inner:
            detail += f": the {counted(zero, 'row')} whose norm n is 0, where W' is 0"
        return Verdict(INFINITE, False, detail, None, found.worst)

    def fault(self, sample: Sample, found: Compared) -> Verdict | None:
        """Return the fault that S has; None if it is a right merge to rounding errors."""
        merged = right_merge(sample.base, sample.adapter, sample.config)
        # The finer bound, for the costs: the coarser one hides a small update.
        bound = Slack(self.layer, PRECISION[sample.dtypes.stored]).bound(
            np.abs(merged), sample.rows, found.norm[sample.rows]
        )
        diagnosis = diagnose(sample, bound)
        is_idle = _is_idle(sample, merged)
        if not found.wrong and (is_idle or not (diagnosis.refuted or diagnosis.part)):
            return None
        detail = ""
        if np.array_equal(sample.stored, sample.base) and self._is_unchanged():
            verdict, detail = "unchanged", "the merge did nothing"
        elif diagnosis.part and not is_idle:
            verdict, detail = diagnosis.part.name, self._place(sample, diagnosis.part)
        elif (diagnosis.fits or is_idle) and not diagnosis.refuted:
            verdict = "damaged"
            detail = counted(found.wrong, "number", of=self._out * self._inner)
        else:
            verdict = " or ".join(diagnosis.names or self._names_across_rows(sample, bound))
        if not verdict:
            verdict, detail = "another adapter", _distances(sample, merged)
        return Verdict(verdict, False, detail, None, found.worst)

    def _names_across_rows(self, sample: Sample, bound: Wide) -> tuple[str, ...]:
        """Return the formulas that S fits, among those that need a square matrix."""
        if self._out != self._inner:
            return ()
        names = diagnose(sample, bound, self._across_rows(sample)).names
        return names or (("transposed",) if self.is_flipped() else ())

    def _place(self, sample: Sample, part: Part) -> str:
        """Return the rows or columns of a part, in words."""
        if part.axis == 0:
            first, last = sample.rows[[part.start, part.stop - 1]].tolist()
            return f"rows {first} to {last} of {self._out}"
        return f"columns {part.start} to {part.stop - 1} of {self._inner}"

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
        m = self.layer.magnitude
        if m is None:
            return
        update, kind = self.layer.update.scaled(self.layer.config.scaling), self.layer.kind
        by_row, by_column = np.zeros(self._out), np.zeros(self._inner)
        kernel = math.prod(self.layer.shape[2:]) if kind.is_transposed else 1
        for rows in row_blocks(self.layer.shape):
            weight = self.task.source.read(rows).astype(np.float64)
            v = self.layer.matrix(weight.reshape(len(weight), -1) + np.asarray(update.rows(rows)))
            if kind.is_transposed:
                by_column[rows.start * kernel : rows.stop * kernel] = np.sum(v * v, axis=0)
                by_row += np.sum(v * v, axis=1)
            else:
                by_row[rows] = np.sum(v * v, axis=1)
                by_column += np.sum(v * v, axis=0)
        v = sample.base + self.layer.update_rows(sample.rows)
        yield from wrong_merges_across_rows(v, sample.rows, m, np.sqrt(by_row), np.sqrt(by_column))

    def is_flipped(self) -> bool:
        """Return True if S is the transpose of W', as W is stored."""
        shape = self.stored.tensor.shape
        if len(shape) != 2:
            return False
        rows = np.unique(np.linspace(0, shape[0] - 1, SLABS).astype(int))
        theirs = [self.stored.read(slice(row, row + 1))[0] for row in rows.tolist()]
        ours = np.concatenate([block.merged[:, rows] for block in self.blocks()]).T
        found = np.asarray(theirs).astype(np.float64)
        epsilon = coarsest((self.stored.tensor.dtype, self.task.source.tensor.dtype)).epsilon
        return bool(np.linalg.norm(found - ours) <= 4 * epsilon * np.linalg.norm(ours))


def _distances(sample: Sample, merged: Wide) -> str:
    """Return how far S is from W' and from W, and how far its norms are from m, in words."""
    with np.errstate(over="ignore"):  # S may hold any numbers
        update, moved = merged - sample.base, sample.stored - sample.base
        text = (
            f"‖S − W'‖ is {_ratio(sample.stored - merged, update):.3g} and ‖S − W‖ "
            f"{_ratio(moved, update):.3g} of ‖W' − W‖"
        )
        if isinstance(sample.adapter, LowRank):
            return text
        length, m = np.linalg.norm(sample.stored, axis=1), np.abs(np.asarray(sample.adapter[2]))
        return f"{text}; rows differ from m by up to {np.max(np.abs(over(length, m) - 1)):.2g} m"


def _ratio(one: Wide, other: Wide) -> float:
    length = float(np.linalg.norm(other))
    return float(np.linalg.norm(one)) / length if length else np.inf


def _is_idle(sample: Sample, merged: Wide) -> bool:
    """Return whether W' differs from W by the rounding of m alone, as before training."""
    length = np.linalg.norm(merged - sample.base, axis=1)
    return bool((length <= IDLE * np.linalg.norm(sample.base, axis=1)).all())


def _kept(sample: Sample) -> float:
    """Return the part of the update that S has; 1 if the update is zero."""
    merged = right_merge(sample.base, sample.adapter, sample.config)
    if _is_idle(sample, merged):
        return 1.0
    update = merged - sample.base
    return float(np.vdot(sample.stored - sample.base, update) / np.vdot(update, update))
