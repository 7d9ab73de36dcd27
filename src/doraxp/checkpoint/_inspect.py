"""What an adapter does, by module: from its factors alone, and with the base beside it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from doraxp._base.types import Array
from doraxp.checkpoint._adapters import AdapterSet
from doraxp.checkpoint._model import Model
from doraxp.checkpoint._plan import plan
from doraxp.checkpoint._rows import Norms, change
from doraxp.checkpoint._shard import Options, merged_rows
from doraxp.layers import AdaptedLayer


class Factored(NamedTuple):
    """What the factors alone tell."""

    update_norm: float
    """‖s B A‖, Frobenius."""
    effective_rank: float
    """exp of the entropy of its singular values as parts of their sum; 0 where B A = 0."""
    magnitude_mean: float
    """Mean of m."""


class Against(NamedTuple):
    """What the base beside it tells."""

    magnitude_change: float
    """ΔM = mean over rows of abs(‖w'ᵢ‖ − ‖wᵢ‖)."""
    direction_change: float
    """ΔD = mean over rows of 1 − cos(w'ᵢ, wᵢ)."""
    conditioning: float
    """min over rows of n / (‖wᵢ‖ + ‖s (B A)ᵢ‖): 1 adds up, 0 cancels."""
    zero_rows: int
    """Rows with n = 0."""


def look_at(layer: AdaptedLayer) -> Factored:
    """Return what the factors of one layer tell."""
    a, b, m = (leaf.astype(np.float64) for leaf in layer.adapter)
    # The singular values of B A are those of R_B R_Aᵀ, which is (rank, rank).
    left, right = (np.asarray(np.linalg.qr(factor, mode="r")) for factor in (b, a.mT))
    small = left @ right.mT
    values = abs(layer.config.scaling) * np.linalg.svd(small, compute_uv=False).ravel()
    total = float(values.sum())
    parts = values[values > 0] / total if total else values[:0]
    rank = float(np.exp(-np.sum(parts * np.log(parts)))) if total else 0.0
    return Factored(float(np.linalg.norm(values)), rank, float(m.mean()))


def look_at_base(model: Model, adapters: AdapterSet) -> dict[str, Against]:
    """Return, by module path, what the base tells; raises what `plan` raises."""
    readers = model.reader_of()
    found = {}
    for name, task in plan(model, adapters).items():
        if task.path is not None:
            norms: list[Norms] = []
            for _ in merged_rows(readers[name], name, task, adapters, Options(), norms):
                pass
            layer = adapters[task.path]
            size, turn, _ = change(norms, layer)
            base, adapted = (np.concatenate(sides) for sides in zip(*norms, strict=True))
            reach = base + _update_norms(layer)
            part = np.divide(adapted, reach, out=np.ones_like(reach), where=reach > 0)
            found[task.path] = Against(
                size, turn, float(part.min()), int(np.count_nonzero(adapted == 0))
            )
    return found


def _update_norms(layer: AdaptedLayer) -> Array:
    a, b, _ = (leaf.astype(np.float64) for leaf in layer.adapter)
    squares = np.einsum("or,or->o", b @ (a @ a.T), b)
    return layer.config.scaling * np.sqrt(np.maximum(squares, 0.0))
