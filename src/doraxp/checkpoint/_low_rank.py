"""Adapters as A, B and m: exactly, or not at all.

::

    (B₁ A₁) ⊙ (B₂ A₂)   row i·r₂ + j of A is row i of A₁ times row j of A₂, and so are the
                        columns of B: rank r₁ · r₂
    C ⊗ (B A)           (I ⊗ B)(C ⊗ A) or (C ⊗ B)(I ⊗ A), with I of the smaller side of C
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from doraxp._base.types import Config, HostArray
from doraxp._core.kinds import LayerKind
from doraxp._core.updates import Hadamard, Kronecker, LowRank, Update
from doraxp.checkpoint._update_names import wide
from doraxp.checkpoint._updated_layer import AnyLayer, UpdatedLayer


class LowRankLayer(NamedTuple):
    """An adapter of one layer whose update is B A, for the matrix of its kind."""

    lora_a: HostArray
    """A, (rank, in)."""
    lora_b: HostArray
    """B, (out, rank)."""
    magnitude: HostArray | None
    """m, (out,); None for plain LoRA."""
    config: Config
    kind: LayerKind
    shape: tuple[int, ...]


def low_rank_layer(path: str, layer: AnyLayer, target: str) -> LowRankLayer:
    """Return a layer with the factors A and B.

    Raises
    ------
    ValueError
        Its update is not B A of a rank below that of a whole matrix; `target` is the format that
        needs it.
    """
    if not isinstance(layer, UpdatedLayer):
        a, b, m = (np.asarray(leaf) for leaf in layer.adapter)
        return LowRankLayer(a, b, m, layer.config, layer.kind, layer.shape)
    if layer.kind.is_stack:
        raise ValueError(
            f"{path}: LoRA of fused experts is not converted: merge it into its base instead, with "
            "doraxp merge"
        )
    factors, config = low_rank(layer.adapter.update), layer.config
    is_conv_by_columns = layer.kind.name == "columns" and len(layer.shape) > 2
    if factors is None or is_conv_by_columns or factors.lora_a.shape[0] > min(factors.shape):
        raise ValueError(
            f"{path}: {target} has updates B A of a low rank only: merge it into its base instead, "
            "with doraxp merge, or approximate it with doraxp convert --to lora --rank R"
        )
    a, b = map(np.asarray, factors)
    if len(a) != config.rank:
        # alpha / rank stays, and so does s, to one rounding.
        config = Config(len(a), config.scaling * len(a))
    if layer.kind.is_transposed:
        a, b = b.T, a.T
    magnitude = layer.adapter.magnitude
    own = None if magnitude is None else np.asarray(magnitude)
    return LowRankLayer(a, b, own, config, layer.kind, layer.shape)


def low_rank(update: Update) -> LowRank | None:
    """Return an update as B A; None for one that has no factors."""
    if isinstance(update, LowRank):
        return update
    if isinstance(update, Hadamard):
        (a1, b1), (a2, b2) = ((wide(leaf) for leaf in part) for part in update)
        a = (a1[:, None, :] * a2[None, :, :]).reshape(-1, a1.shape[1])
        b = (b1[:, :, None] * b2[:, None, :]).reshape(len(b1), -1)
        return LowRank(a, b)
    right = low_rank(update.right) if isinstance(update, Kronecker) else None
    if not isinstance(update, Kronecker) or right is None:
        return None
    left, (a, b) = wide(update.left), (wide(leaf) for leaf in right)
    p, q = left.shape
    if p <= q:
        return LowRank(np.kron(left, a), np.kron(np.eye(p, dtype=b.dtype), b))
    return LowRank(np.kron(np.eye(q, dtype=a.dtype), a), np.kron(left, b))
