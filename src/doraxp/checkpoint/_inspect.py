"""The effect of an adapter, module by module: from its factors alone, and beside the base."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from doraxp.checkpoint._adapters import AdapterSet
from doraxp.checkpoint._change import change, joined, update_squares
from doraxp.checkpoint._engine import load_engine
from doraxp.checkpoint._fit import AS_FILED, Fit
from doraxp.checkpoint._model import Model
from doraxp.checkpoint._options import Options, merge_dtype
from doraxp.checkpoint._plan import plan
from doraxp.checkpoint._rows import merged_blocks
from doraxp.checkpoint._tasks import MergedTensor, parts_of
from doraxp.layers import AdaptedLayer


class Factored(NamedTuple):
    """The figures that follow from the factors alone."""

    update_norm: float
    """‖s B A‖, Frobenius."""
    effective_rank: float
    """exp of the entropy of its singular values as parts of their sum; 0 where B A = 0."""
    magnitude_mean: float
    """Mean of m."""


class Against(NamedTuple):
    """The figures that need the base."""

    magnitude_change: float
    """ΔM = mean over rows of abs(‖w'ᵢ‖ − ‖wᵢ‖)."""
    direction_change: float
    """ΔD = mean over rows of 1 − cos(w'ᵢ, wᵢ)."""
    conditioning: float
    """min over rows of n / (‖wᵢ‖ + ‖s (B A)ᵢ‖): 1 adds up, 0 cancels."""
    zero_rows: int
    """Rows with n = 0."""


def look_at(layer: AdaptedLayer) -> Factored:
    """Return the figures of one layer that follow from its factors."""
    a, b, m = (np.asarray(leaf, np.float64) for leaf in layer.adapter)
    # The singular values of B A are those of R_B R_Aᵀ, which is (rank, rank).
    left, right = (np.asarray(np.linalg.qr(factor, mode="r")) for factor in (b, a.mT))
    small = left @ right.mT
    values: NDArray[np.float64] = (
        abs(layer.config.scaling) * np.linalg.svd(small, compute_uv=False).ravel()
    )
    total = float(values.sum())
    parts = values[values > 0] / total if total else values[:0]
    rank = float(np.exp(-np.sum(parts * np.log(parts)))) if total else 0.0
    return Factored(float(np.linalg.norm(values)), rank, float(m.mean()))


def look_at_base(
    model: Model,
    adapters: AdapterSet,
    *,
    fit: Fit = AS_FILED,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Against]:
    """Return the figures of all layers that need the base, by module path.

    Parameters
    ----------
    model : Model
    adapters : AdapterSet
    fit : Fit
        How the adapter fits the base, where the files do not say it.
    on_bytes : callable
        Called with the bytes of the base that were read so far, and those of all its adapted
        weights.

    Raises
    ------
    CheckpointError
        The adapter does not fit the base, or a weight contains NaN or infinity.
    """
    engine = load_engine("numpy")
    found: dict[str, Against] = {}
    rows: dict[str, int] = {}
    done = 0
    tasks = plan(model, adapters, fit).tasks
    parts = [
        (name, part)
        for name, task in tasks.items()
        for part in parts_of(task)
        if isinstance(part, MergedTensor)
    ]
    total = sum(part.source.tensor.nbytes for _, part in parts)
    for name, task in parts:
        layer, tensor = adapters.read(task.layer), task.source.tensor
        dtype = merge_dtype(tensor, tensor, Options())
        norms = []
        for block in merged_blocks(name, task.source, layer, engine, dtype):
            norms.append(block.norms)
            on_bytes(done + tensor.nbytes * block.rows.stop // tensor.shape[0], total)
        done += tensor.nbytes
        moved = change(norms, layer)
        base, adapted = joined(norms)
        reach = base + np.sqrt(np.maximum(update_squares(layer), 0.0))
        part = np.divide(adapted, reach, out=np.ones_like(reach), where=reach > 0)
        own = Against(
            moved.magnitude,
            moved.direction,
            float(part.min()),
            int(np.count_nonzero(adapted == 0)),
        )
        before, size = found.get(task.path, own), rows.get(task.path, 0)
        rows[task.path] = size + len(base)
        found[task.path] = _together(before, size, own, len(base))
    return found


def _together(one: Against, rows: int, other: Against, more: int) -> Against:
    """Return the figures of a module that is several tensors of the base, from those of two."""
    share = more / (rows + more)
    return Against(
        one.magnitude_change * (1 - share) + other.magnitude_change * share,
        one.direction_change * (1 - share) + other.direction_change * share,
        min(one.conditioning, other.conditioning),
        (one.zero_rows if rows else 0) + other.zero_rows,
    )
