"""The audit of a weight to which changes of several adapters should have been added.

W  before the merge     W' = W + Σ strength (W'ᵢ − W)     S  the weight that the file has
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from doraxp._base.types import HostArray
from doraxp._base.words import counted
from doraxp._core.kinds import LayerKind
from doraxp.checkpoint._audit_errors import DAMAGED, Compared, compare
from doraxp.checkpoint._audit_sample import Dtypes
from doraxp.checkpoint._audit_weight import INFINITE, Verdict
from doraxp.checkpoint._engine import Engine
from doraxp.checkpoint._matrix import row_blocks
from doraxp.checkpoint._options import Options, merge_dtype
from doraxp.checkpoint._precision import Precision
from doraxp.checkpoint._rows import Block, Term, merged_blocks
from doraxp.checkpoint._safetensors import DTYPES, Source
from doraxp.checkpoint._shard import OnBytes
from doraxp.checkpoint._slack import Places, Wide
from doraxp.checkpoint._tasks import SummedTensor
from doraxp.checkpoint._updated_layer import UpdatedLayer, reach


class SumSlack:
    """The largest error of a right sum: ε (4 |W'| + 4 Σ |strength| (lᵢ + ‖w‖)) by rows.

    lᵢ bounds the numbers in a row of W'ᵢ and of its update, which may cancel in the sum. The steps
    in which a tool makes W'ᵢ are not known, so this bound is not derived as `Slack` is.
    """

    def __init__(self, lengths: Wide, precision: Precision) -> None:
        self._lengths, self._precision = lengths, precision

    def bound(
        self, size: HostArray, rows: Places, norm: Wide, columns: Places = slice(None)
    ) -> HostArray:
        """Return the bound for some rows, in the shape and dtype of `size`, which is abs(W')."""
        epsilon, normal = self._precision
        lengths = np.maximum(self._lengths[rows], normal)[:, None].astype(size.dtype)
        bound: HostArray = size.dtype.type(4 * epsilon) * (size + lengths)
        return bound


def _lengths(task: SummedTensor, terms: Sequence[Term]) -> Wide:
    """Return Σ |strength| lᵢ by the rows of the file."""
    rows = task.source.tensor.shape[0]
    total = np.zeros(rows)
    for term in terms:
        layer = term.layer
        if not isinstance(layer, UpdatedLayer):
            blocks = (layer.read(block) for block in row_blocks(layer.tensor.shape))
            own = np.concatenate([np.abs(x.reshape(len(x), -1)).max(axis=1) for x in blocks])
        else:
            found, m = reach(layer.update), layer.magnitude
            own = abs(layer.config.scaling) * found.rows * found.columns.max()
            if m is not None:
                own = own + (np.abs(m).max() if layer.kind.is_transposed else np.abs(m))
        total += abs(term.strength) * own
    return total


def audit_sum(
    name: str, task: SummedTensor, stored: Source, engine: Engine, on_bytes: OnBytes
) -> Verdict:
    """Return the verdict on a weight; the arguments are those of `audit_weight`."""
    before, after = task.source.tensor, stored.tensor
    if before.shape != after.shape:
        on_bytes(before.nbytes)
        return Verdict("another shape", False, f"{after.shape} for {before.shape}")
    terms, row_bytes = task.read(), before.nbytes // before.shape[0]
    dtype = merge_dtype(before, after, Options())
    lengths, total = _lengths(task, terms), sum(abs(strength) for strength in task.strengths)

    def blocks() -> Iterator[Block]:
        for block in merged_blocks(name, task.source, terms, engine, dtype):
            lengths[block.rows] += total * np.asarray(block.norms.base, np.float64)
            yield block

    found = compare(
        blocks(),
        stored,
        LayerKind("conv" if len(before.shape) > 2 else "linear"),
        Dtypes(after.dtype, before.dtype, *[after.dtype] * 3),
        partial(SumSlack, lengths),
        lambda count: on_bytes(row_bytes * count),
    )
    if found.infinite:
        return Verdict(INFINITE, False, counted(found.infinite, "number"), None, found.worst)
    if not found.wrong:
        return Verdict("rounded" if found.differ else "exact", True, "", None, found.worst)
    return _fault(task, stored, found)


def _fault(task: SummedTensor, stored: Source, found: Compared) -> Verdict:
    dtype, size = DTYPES[stored.tensor.dtype], int(np.prod(stored.tensor.shape))
    with np.errstate(over="ignore"):
        is_unchanged = all(
            np.array_equal(task.source.read(rows).astype(dtype), stored.read(rows))
            for rows in row_blocks(stored.tensor.shape)
        )
    if is_unchanged:
        return Verdict("unchanged", False, "the merge did nothing", None, found.worst)
    if found.wrong <= DAMAGED * size:
        detail = counted(found.wrong, "number", of=size)
        return Verdict("damaged", False, detail, None, found.worst)
    return Verdict(
        "another sum", False, counted(found.wrong, "number", "differs"), None, found.worst
    )
