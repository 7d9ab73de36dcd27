"""`Change`: the distance that a merge moves one weight."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from doraxp.checkpoint._rows import Norms
from doraxp.checkpoint._updated_layer import UpdatedLayer

IDLE, KEPT, DROWNED = 1e-6, 0.9, 0.5**0.5
"""The relative change of a row that the rounding of m to float32 may cause without training; the
part of a change that the stored dtype should keep; the least cosine of a change that is more than
the noise of quantising."""


class Change(NamedTuple):
    """The distance that a merge moves one weight."""

    magnitude: float
    """ΔM = mean over the matrix's rows of abs(‖w'ᵢ‖ − ‖wᵢ‖)."""
    direction: float
    """ΔD = mean over the matrix's rows of 1 − cos(w'ᵢ, wᵢ)."""
    largest: float
    """max over the rows of ‖w'ᵢ − wᵢ‖ / ‖wᵢ‖."""
    kept: float = 1.0
    """⟨stored − W, W' − W⟩ / ‖W' − W‖²: the part of the change that the stored dtype keeps. 1 for
    an idle adapter; NaN where the squares overflow."""
    cosine: float | None = None
    """Of stored − W and W' − W, of a weight that is quantised again; None for all others."""

    @property
    def is_idle(self) -> bool:
        """Whether the rounding of m to float32 alone may have caused the change."""
        return self.largest <= IDLE

    @property
    def is_lost(self) -> bool:
        """Whether the stored dtype keeps less than nine tenths of the change."""
        return self.kept < KEPT

    @property
    def is_drowned(self) -> bool:
        """Whether quantising added more to the weight than the change itself.

        Then the cosine is below √½.
        """
        return self.cosine is not None and self.cosine < DROWNED


def joined(norms: Iterable[Norms]) -> list[NDArray[np.float64]]:
    """Return ‖wᵢ‖, n and, of a sum, ‖w'ᵢ − wᵢ‖ of all rows, from those of the blocks."""
    sides = zip(*norms, strict=True)
    return [np.concatenate(side).astype(np.float64) for side in sides if side[0] is not None]


def change(
    norms: Iterable[Norms],
    layer: UpdatedLayer | None,
    kept: float = 1.0,
    cosine: float | None = None,
) -> Change:
    """Return ΔM, ΔD and the largest change, from the sides of the triangle in each row.

    ::

        1 − cos(v, w) = (‖v − w‖² − (n − ‖w‖)²) / (2 n ‖w‖)      v − w = s ΔW
        ‖w' − w‖² = (m − ‖w‖)² + 2 m ‖w‖ (1 − cos)

    Parameters
    ----------
    norms : iterable of Norms
        Of all blocks.
    layer : UpdatedLayer, optional
        None for a sum of changes, whose norms have ‖w' − w‖: then v is w'.
    kept, cosine : float
        As `Change` has them.
    """
    base, adapted, *others = joined(norms)
    update = layer.update_squares() if layer is not None else others[0] ** 2  # ‖v − w‖²
    m = adapted if layer is None else layer.magnitude
    m = np.where(adapted > 0, adapted if m is None else m, 0.0)
    length = np.abs(m)
    with np.errstate(over="ignore", invalid="ignore"):  # squares of what is above 1e154
        sides = 2 * adapted * base
        turn = update - (adapted - base) ** 2
        direction = np.divide(turn, sides, out=np.ones_like(turn), where=sides > 0)
        direction = np.where((base == 0) & (m == 0), 0.0, np.clip(direction, 0.0, 2.0))
        direction = np.where(m < 0, 2.0 - direction, direction)
        moved = np.sqrt((length - base) ** 2 + 2 * length * base * direction)
    ratio = np.divide(moved, base, out=np.where(moved > 0, np.inf, 0.0), where=base > 0)
    largest = float(np.max(ratio))
    return Change(
        float(np.mean(np.abs(length - base))),
        float(np.mean(direction)),
        largest,
        kept if largest > IDLE else 1.0,
        cosine if cosine is None or largest > IDLE else 1.0,
    )
