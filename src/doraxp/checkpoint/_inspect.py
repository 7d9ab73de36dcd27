"""The effect of an adapter, module by module: from its factors alone, and beside the base."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from doraxp._core.updates import Kronecker, LowRank, Update
from doraxp.checkpoint._adapters import AdapterSet
from doraxp.checkpoint._change import change, joined
from doraxp.checkpoint._engine import load_engine
from doraxp.checkpoint._expert_names import Stack
from doraxp.checkpoint._fit import AS_FILED, Fit
from doraxp.checkpoint._matrix import Wide, row_blocks
from doraxp.checkpoint._model import Model
from doraxp.checkpoint._options import Options, merge_dtype
from doraxp.checkpoint._plan import plan
from doraxp.checkpoint._quantised.reader import quantised_as
from doraxp.checkpoint._rows import Term, merged_blocks
from doraxp.checkpoint._tasks import MergedTensor, parts_of
from doraxp.checkpoint._updated_layer import UpdatedLayer
from doraxp.layers import AdaptedLayer


class Factored(NamedTuple):
    """The figures that follow from the factors alone."""

    update_norm: float
    """‖s ΔW‖, Frobenius."""
    effective_rank: float
    """exp of the entropy of its singular values as parts of their sum; 0 where B A = 0."""
    magnitude_mean: float | None
    """Mean of m; None without a magnitude."""


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
    quantised: str | None = None
    """How the weight is quantised in the base; None for a dense one."""


def look_at(layer: AdaptedLayer | UpdatedLayer) -> Factored:
    """Return the figures of one layer that follow from its factors."""
    if isinstance(layer, UpdatedLayer):
        update, m = layer.update, layer.magnitude
        values = _singular_values(update)
    else:
        a, b, m = (np.asarray(leaf, np.float64) for leaf in layer.adapter)
        values = _of_product(a, b)
    values = abs(layer.config.scaling) * values
    total = float(values.sum())
    parts = values[values > 0] / total if total else values[:0]
    rank = float(np.exp(-np.sum(parts * np.log(parts)))) if total else 0.0
    mean = None if m is None else float(m.mean())
    return Factored(float(np.linalg.norm(values)), rank, mean)


def _of_product(a: Wide, b: Wide) -> Wide:
    """Return the singular values of B A: those of R_B R_Aᵀ, which is (rank, rank)."""
    left, right = (np.asarray(np.linalg.qr(factor, mode="r")) for factor in (b, a.mT))
    values: Wide = np.linalg.svd(left @ right.mT, compute_uv=False).ravel()
    return values


def _singular_values(update: Update) -> Wide:
    """Return the singular values of ΔW, of float64 arrays.

    Those of C ⊗ U are all products of one of C and one of U. Of other updates they are the roots of
    the eigenvalues of the smaller Gram matrix.
    """
    if isinstance(update, LowRank | Stack):
        return _of_product(*map(np.asarray, update))
    if isinstance(update, Kronecker):
        left = np.linalg.svd(np.asarray(update.left), compute_uv=False)
        return np.asarray(np.kron(left, _singular_values(update.right)), np.float64)
    out, inner = update.shape
    blocks = (np.asarray(update.rows(rows)) for rows in row_blocks(update.shape))
    if out < inner:
        whole = np.concatenate(list(blocks))
        gram = whole @ whole.T
    else:
        gram = sum((block.T @ block for block in blocks), np.zeros((inner, inner)))
    return np.asarray(np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0.0)), np.float64)


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
        layer, tensor = task.read(), task.source.tensor
        dtype = merge_dtype(tensor, tensor, Options())
        norms = []
        for block in merged_blocks(name, task.source, (Term(layer),), engine, dtype):
            norms.append(block.norms)
            on_bytes(done + tensor.nbytes * block.rows.stop // tensor.shape[0], total)
        done += tensor.nbytes
        moved = change(norms, layer)
        base, adapted = joined(norms)
        reach = base + np.sqrt(np.maximum(layer.update_squares(), 0.0))
        part = np.divide(adapted, reach, out=np.ones_like(reach), where=reach > 0)
        own = Against(
            moved.magnitude,
            moved.direction,
            float(part.min()),
            int(np.count_nonzero(adapted == 0)),
            quantised_as(task.source),
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
        other.quantised,
    )
