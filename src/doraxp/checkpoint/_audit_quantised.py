"""The audit of a weight that the merged model has in a quantised format.

::

    abs(S − W') ≤ resolution · max abs(W', S) + ε abs(S)

The maximum is over the numbers that may share a scale, and ε is of the dtype that the format's own
reader returns.

W' is the weight before it is quantised, and S the weight that the file has. A change that is
smaller than the steps of the format fits this bound with and without the merge. So the verdict
tells the cosine of S − W and W' − W too.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from doraxp._base.words import counted
from doraxp.checkpoint._audit_weight import INFINITE, Verdict
from doraxp.checkpoint._change import DROWNED
from doraxp.checkpoint._engine import Engine
from doraxp.checkpoint._matrix import Wide, row_blocks
from doraxp.checkpoint._options import Options, merge_dtype
from doraxp.checkpoint._precision import PRECISION
from doraxp.checkpoint._quantised.reader import QuantisedReader
from doraxp.checkpoint._rows import merged_blocks
from doraxp.checkpoint._safetensors import Source
from doraxp.checkpoint._shard import OnBytes
from doraxp.checkpoint._tasks import Changed, Part, read_terms

QUANTISED, DROWNED_IN = "quantised", "lost in quantising"


def audit_quantised(
    name: str,
    part: Part,
    stored: Source,
    weight: QuantisedReader,
    engine: Engine,
    on_bytes: OnBytes,
) -> Verdict:
    """Return the verdict on a weight that is quantised in the merged model.

    Parameters
    ----------
    name : str
        The weight's name in the base.
    part : Part
        The way in which it should be made.
    stored : Source
        S.
    weight : QuantisedReader
        How S is stored.
    engine : Engine
    on_bytes : callable
        Called with numbers of bytes of W that were audited.
    """
    before, after = part.source.tensor, stored.tensor
    if before.shape != after.shape:
        on_bytes(before.nbytes)
        return Verdict("another shape", False, f"{after.shape} for {before.shape}")
    how, row_bytes = weight.quantisation, before.nbytes // before.shape[0]
    epsilon = PRECISION[after.dtype].epsilon
    wrong = infinite = moved = 0
    along = squares = changes = 0.0
    for rows, base, exact in _blocks(name, part, engine, how.step):
        found = _flat(stored, rows)
        infinite += int(np.count_nonzero(~np.isfinite(found)))
        largest = np.maximum(np.abs(exact), np.abs(found))
        reach = largest.max(axis=1 if how.step == 1 else None, keepdims=True, initial=0.0)
        bound = how.resolution * reach + epsilon * np.abs(found)
        wrong += int(np.count_nonzero(~(np.abs(found - exact) <= bound)))
        update, change = exact - base, found - base
        along += float(np.vdot(update, change))
        squares += float(np.vdot(update, update))
        changes += float(np.vdot(change, change))
        moved += int(np.count_nonzero(change))
        on_bytes(row_bytes * (rows.stop - rows.start))
    if infinite:
        return Verdict(INFINITE, False, counted(infinite, "number"))
    if squares and not moved:
        return Verdict("unchanged", False, "the merge did nothing")
    if wrong:
        return Verdict(
            "another weight", False, f"{counted(wrong, 'number')} beyond the steps of {how.label}"
        )
    if not isinstance(part, Changed) or not squares:
        return Verdict(QUANTISED, True, how.label)
    kept, cosine = along / squares, along / np.sqrt(squares * changes)
    text = f"{how.label}; cosine {cosine:.2g} of its change and the update"
    return Verdict(QUANTISED if cosine >= DROWNED else DROWNED_IN, cosine >= DROWNED, text, kept)


def _blocks(name: str, part: Part, engine: Engine, step: int) -> Iterator[tuple[slice, Wide, Wide]]:
    """Yield rows, and W and W' there, in float64 and flat."""
    source = part.source
    if isinstance(part, Changed):
        dtype = merge_dtype(source.tensor, source.tensor, Options())
        for block in merged_blocks(name, source, read_terms(part), engine, dtype, multiple=step):
            yield block.rows, block.weight.astype(np.float64), block.merged.astype(np.float64)
        return
    for rows in row_blocks(source.tensor.shape, step):
        exact = source.read(rows).astype(np.float64).reshape(rows.stop - rows.start, -1)
        yield rows, exact, exact


def _flat(stored: Source, rows: slice) -> Wide:
    found: Wide = stored.read(rows).astype(np.float64)
    return found.reshape(len(found), -1)
