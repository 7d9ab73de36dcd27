"""A low-rank adapter from two weights: `extract_layer`.

::

    W, W*  (out, in)  the weight before and after      D = W* − W
    W' = g⊙(W + B A)  the adapter's weight, with the row gains g = m / n = 1 + γ

With B' = g⊙B, W' = g⊙W + B' A. For an A with orthonormal rows, let d⊥ = d − (d Aᵀ) A be the part of
a row that A does not reach, and w⊥ likewise. The row's best B' and γ have closed forms:

    B' = (d − γ w) Aᵀ        γ = ⟨d⊥, w⊥⟩ / ‖w⊥‖²        error² = ‖d⊥‖² − ⟨d⊥, w⊥⟩² / ‖w⊥‖²

For a given γ, the best A has the top right singular vectors of E = D − γ⊙W. With γ = 0 that is the
truncated SVD of D: LoRA. From there γ and A take turns, and no turn makes the error larger.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from doraxp.checkpoint._pair import Matrix, OnRows, Pair, Sums, row_sums
from doraxp.checkpoint._subspace import MORE, Best, Subspace, alternate, krylov, low_rank, whole

_LOSS = 1e-5
"""Part of the squared error by which a pass or a turn must lower it to be followed by another."""
_TENTH = 0.1
"""The relative error of `Extracted.rank_for_tenth`."""
_CYCLES = 4
"""The most subspaces after the first one for DoRA; for the truncated SVD twice as many."""


class Extracted(NamedTuple):
    """An adapter with s = 1, in float32, and how far its weight W' is from W*."""

    lora_a: NDArray[np.float32]
    """A, (rank, in)."""
    lora_b: NDArray[np.float32]
    """B, (out, rank)."""
    magnitude: NDArray[np.float32] | None
    """m, (out,); None for LoRA."""
    error: float
    """‖W' − W*‖, Frobenius."""
    lora_error: float
    """‖W + B A − W*‖ of the truncated SVD of W* − W at the same rank."""
    update_norm: float
    """‖W* − W‖."""
    rank_for_tenth: int | None
    """The least known rank whose truncated SVD has an error of at most a tenth of the update norm;
    None where the subspace has no such rank."""


class _Factors(NamedTuple):
    lora_a: NDArray[np.float32]
    lora_b: NDArray[np.float32]
    gain: Matrix
    """g, (out,), before A and B were rounded."""
    squares: Matrix
    """The squared errors of SVD LoRA of each rank from 1; empty for DoRA."""


def extract_layer(
    pair: Pair,
    rank: int,
    *,
    method: Literal["dora", "lora"] = "dora",
    on_rows: OnRows = lambda count: None,
) -> Extracted:
    """Return the adapter of W whose weight W' is near W*: (m / n)⊙(W + B A), or W + B A.

    The error of "dora" is not above that of "lora", whose B A is the truncated SVD of W* − W. Two
    calls give the same bytes.

    Parameters
    ----------
    pair : Pair
        W and W*, read block by block several times. The memory needed is that of some blocks and
        of (in + out) numbers for about eight times the rank.
    rank : int
        At least 1; above min(out, in) it is lowered to that.
    method : {"dora", "lora"}
    on_rows : callable
        Called with the size of each block that was read.

    Raises
    ------
    FloatingPointError
        W or W* contains NaN, infinity, or numbers whose squares overflow.
    """
    rank = min(rank, *pair.shape)
    sums = row_sums(pair, on_rows)
    total = float(sums.dd.sum())
    if not np.isfinite(total + sums.ww.sum()):
        raise FloatingPointError("W and W* must be finite, and so must be their squares")
    candidates = list(_candidates(pair, sums, rank, method, on_rows))
    measured = _measured(pair, candidates, on_rows)
    lora_error = _norm(measured[0].dd)
    update_norm, tenth = float(np.sqrt(total)), _first_within(candidates[0].squares, total)
    if method == "lora":
        a, b = candidates[0][:2]
        return Extracted(a, b, None, lora_error, lora_error, update_norm, tenth)
    # Rounding to float32 may leave the truncated SVD with its own best m the better one.
    fitted = [_magnitude(own) for own in measured]
    errors = [_norm(squares) for _, squares in fitted]
    least = errors.index(min(errors))
    (a, b, *_), (m, _) = candidates[least], fitted[least]
    return Extracted(a, b, m, errors[least], lora_error, update_norm, tenth)


def _candidates(
    pair: Pair, sums: Sums, rank: int, method: str, on_rows: OnRows
) -> Iterator[_Factors]:
    """Yield the factors of SVD LoRA, and then those of DoRA.

    The subspace is built anew as long as the error falls. Only one is in memory at a time.
    """
    gamma, total = np.zeros(pair.shape[0]), float(sums.dd.sum())
    found = whole(pair, on_rows)
    if found is None:
        width = min(rank + MORE, pair.shape[1])
        # A fixed seed, for the same bytes each time.
        start = np.random.default_rng(0).standard_normal((pair.shape[1], width))
        found = krylov(pair, gamma, start, rank, total, on_rows, loss=_LOSS)
        for _ in range(2 * _CYCLES):
            if found.is_settled or found.is_whole:
                break
            start = found.start(gamma, rank)
            del found
            found = krylov(pair, gamma, start, rank, total, on_rows, loss=_LOSS)
    yield _factors(found, *low_rank(found, sums, rank))
    if method == "lora":
        return
    best = alternate(found, sums, gamma, rank, loss=_LOSS)
    for _ in range(_CYCLES):
        if found.is_whole:
            break
        start, total = found.start(best.gamma, rank), float(sums.squares(best.gamma).sum())
        del found
        found = krylov(pair, best.gamma, start, rank, total, on_rows, loss=_LOSS)
        before = best.squares
        best = alternate(found, sums, best.gamma, rank, loss=_LOSS)
        if before - best.squares <= 10 * _LOSS * before:
            break
    yield _factors(found, best, np.empty(0))


def _factors(found: Subspace, best: Best, squares: Matrix) -> _Factors:
    """Return A, B = B' / g and g, with the squared errors of each rank."""
    gain = 1 + best.gamma
    along = found.difference @ best.coordinates.T
    along -= best.gamma[:, None] * (found.weight @ best.coordinates.T)
    a, b = found.rows(best.coordinates), along / gain[:, None]
    return _Factors(a.astype(np.float32), b.astype(np.float32), gain, squares)


def _first_within(squares: Matrix, total: float) -> int | None:
    """Return the first rank whose squared error is at most that of a tenth of the update."""
    ranks = np.flatnonzero(squares <= _TENTH**2 * total)
    return int(ranks[0]) + 1 if len(ranks) else None


def _measured(pair: Pair, candidates: list[_Factors], on_rows: OnRows) -> list[Sums]:
    """Return the sums of the rows w* − g v and g v, with v = w + b A, for each candidate.

    The first is the error, except for the rounding of m. So the sums of its squares lose nothing.
    """
    sums = [Sums.zeros(pair.shape[0]) for _ in candidates]
    for block in pair.blocks():
        for (a, b, gain, _), own in zip(candidates, sums, strict=True):
            v = b[block.rows].astype(np.float64) @ a[:, block.columns].astype(np.float64)
            v += block.base
            v *= gain[block.rows, None]
            own.add(block.rows, block.tuned - v, v)
        on_rows(block.base.size)
    return sums


def _magnitude(sums: Sums) -> tuple[NDArray[np.float32], Matrix]:
    """Return m = ⟨w*, v⟩ / ‖v‖ in float32, never below 0, and the squared error of each row.

    m is the same for every positive multiple of v. The sums are those of g v.
    """
    norm = np.sqrt(sums.ww)
    along = np.divide(sums.dw, norm, out=np.zeros_like(norm), where=norm > 0)
    m = np.maximum(norm + along, 0).astype(np.float32)
    gamma = np.divide(m, norm, out=np.ones_like(norm), where=norm > 0) - 1
    return m, sums.squares(gamma)


def _norm(squares: Matrix) -> float:
    return float(np.sqrt(squares.sum()))
