"""The part of two weights that a low-rank update of their difference needs: a small subspace.

    W, W*   (out, in)   the weight before and after    D = W* − W
    γ       (out,)      the row gains less 1           E = D − γ⊙W
    K       (in, k)     orthonormal columns            D K and W K are (out, k)
    A = C Kᵀ  (rank, in), orthonormal rows, with C (rank, k)

The best A for a given γ has the top right singular vectors of E. The spaces of block Krylov

    span [Q, EᵀE Q, (EᵀE)² Q, ...]

come near them in a few passes, also where the singular values are close together. D K and W K are
kept, so γ and A can improve each other within the subspace without a further pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from doraxp._base.types import HostArray
from doraxp.checkpoint._pair import Matrix, OnRows, Pair, Sums, wide

DENSE, NARROW = 1 << 20, 512
"""A matrix of at most so many numbers, and at most so many rows or columns, is kept in memory."""
_MEMORY = 40 << 20
"""Bytes for K, D K and W K of a larger one."""
MORE, _STEPS = 8, 8
"""Columns of a block of K beyond the rank, and the most blocks of K."""
_TURNS = 10, 1 << 14
"""The fewest turns allowed, and their number times k: a turn takes about k³ operations."""
_CHUNK = 1 << 18
"""Numbers of E K at a time."""
_LEAST, _MOST = 2.0**-20, 2.0**20
"""Limits of a row's gain 1 + γ. B = B' / gain stays within the range of float32."""
_ALONG = 1e-6
"""Part of ‖w‖² below which ‖w⊥‖² counts as rounding."""


class Subspace(NamedTuple):
    """K with the products of both matrices."""

    basis: Matrix | None
    """K; None for the identity."""
    difference: Matrix
    """D K."""
    weight: Matrix
    """W K."""
    is_settled: bool = False
    """Whether the last block of K lowered the error by a negligible part only."""

    @property
    def is_whole(self) -> bool:
        """Whether K spans all columns, as only a complete basis does."""
        return self.basis is None or self.basis.shape[0] == self.basis.shape[1]

    def start(self, gamma: Matrix, rank: int) -> Matrix:
        """Return columns for another subspace: the top right singular vectors of E in this one."""
        return self.rows(top(self, gamma, rank + MORE)[0]).T

    def rows(self, coordinates: Matrix) -> Matrix:
        """Return A = C Kᵀ."""
        return coordinates if self.basis is None else coordinates @ self.basis.T

    def chunks(self) -> Iterator[slice]:
        """Cut the rows into pieces that float64 has room for."""
        step = max(1, _CHUNK // self.difference.shape[1])
        return (slice(at, at + step) for at in range(0, len(self.difference), step))

    def error(self, gamma: Matrix, rows: slice) -> Matrix:
        """Return rows of E K."""
        return np.asarray(
            self.difference[rows] - gamma[rows, None] * self.weight[rows], dtype=np.float64
        )


class Best(NamedTuple):
    """A low-rank update in a subspace, with the row gains that fit it."""

    coordinates: Matrix
    """C."""
    gamma: Matrix
    squares: float
    """‖W' − W*‖², Frobenius."""


def whole(pair: Pair, on_rows: OnRows) -> Subspace | None:
    """Return the subspace of all rows, K = I; None where the matrices are too large for it."""
    if pair.shape[0] * pair.shape[1] > DENSE or min(pair.shape) > NARROW:
        return None
    difference, weight = np.empty(pair.shape), np.empty(pair.shape)
    for block in pair.blocks():
        place = (block.rows, block.columns)
        weight[place], difference[place] = wide(block)
        on_rows(block.base.size)
    return Subspace(None, difference, weight)


def krylov(
    pair: Pair,
    gamma: Matrix,
    start: Matrix,
    rank: int,
    total: float,
    on_rows: OnRows,
    *,
    loss: float,
) -> Subspace:
    """Return the block Krylov subspace of EᵀE from a few columns.

    Parameters
    ----------
    pair : Pair
    gamma : array, shape (out,)
    start : array, shape (in, more than rank)
    rank : int
    total : float
        ‖E‖².
    on_rows : callable
        Called with the size of each block that was read.
    loss : float
        The passes end when one lowers the error by less than this part of it.
    """
    out, inner = pair.shape
    width = start.shape[1]
    most = min(_STEPS, max(2, _MEMORY // (8 * width * (2 * out + inner))), -(-inner // width))
    size = min(most * width, inner)
    columns = np.empty((inner, size))
    difference, weight = np.empty((out, size)), np.empty((out, size))
    block, end, last = np.linalg.qr(start)[0], 0, total
    while True:
        new = slice(end, end + block.shape[1])
        end = new.stop
        columns[:, new] = block
        image = _products(pair, block, gamma, on_rows, difference[:, new], weight[:, new])
        found = Subspace(columns[:, :end], difference[:, :end], weight[:, :end])
        left = total - float(top(found, gamma, rank)[1][:rank].sum())
        settled = last - left <= loss * left
        if settled or end == size:
            return found._replace(is_settled=settled)
        last = left
        block = _next(image, columns[:, :end])


def _next(image: Matrix, basis: Matrix) -> Matrix:
    """Return orthonormal columns, orthogonal to K, that span the rest of EᵀE K."""
    for _ in range(2):  # the first time leaves rounding errors of the part along K
        image = np.linalg.qr(image - basis @ (basis.T @ image))[0]
    return image[:, : basis.shape[0] - basis.shape[1]]


def _products(
    pair: Pair, block: Matrix, gamma: Matrix, on_rows: OnRows, difference: Matrix, weight: Matrix
) -> Matrix:
    """Return EᵀE Q from one pass, or from two where the blocks are columns.

    D Q and W Q are written to `difference` and `weight`.
    """
    inner = pair.shape[1]
    difference[:], weight[:], image = 0, 0, np.zeros((inner, block.shape[1]))
    bent = bool(gamma.any())

    def back(rows: slice, columns: slice, d: HostArray, w: HostArray) -> None:
        y = difference[rows] - gamma[rows, None] * weight[rows]
        if bent:
            w *= gamma[rows, None].astype(w.dtype)
            d -= w
        image[columns] += d.T @ y.astype(d.dtype)

    whole_rows = True
    for part in pair.blocks():
        w, d = wide(part)
        q = block[part.columns].astype(w.dtype)
        difference[part.rows] += d @ q
        weight[part.rows] += w @ q
        whole_rows = part.columns.stop - part.columns.start == inner
        if whole_rows:
            back(part.rows, part.columns, d, w)
        on_rows(w.size)
    if not whole_rows:
        for part in pair.blocks():
            w, d = wide(part)
            back(part.rows, part.columns, d, w)
            on_rows(w.size)
    return image


def top(found: Subspace, gamma: Matrix, rank: int) -> tuple[Matrix, Matrix]:
    """Return the top right singular vectors of E K, (rank, k), and all squared singular values.

    Both begin with the largest value.
    """
    out, size = found.difference.shape
    if size <= out:
        gram = np.zeros((size, size))
        for rows in found.chunks():
            part = found.error(gamma, rows)
            gram += part.T @ part
        values, vectors = np.linalg.eigh(gram)
        return vectors[:, : -rank - 1 : -1].T, values[::-1]
    error = found.error(gamma, slice(None))
    values, vectors = np.linalg.eigh(error @ error.T)
    right = np.linalg.qr(error.T @ vectors[:, : -rank - 1 : -1])[0]
    return right.T, values[::-1]


def low_rank(found: Subspace, sums: Sums, rank: int) -> tuple[Best, Matrix]:
    """Return the best update with γ = 0, the truncated SVD of D in the subspace.

    Also return the squared error ‖B A − D‖² of the truncated SVD of each rank from 1: never below
    that of D's own, and equal to it for a whole subspace.
    """
    gamma = np.zeros_like(sums.dd)
    coordinates, values = top(found, gamma, rank)
    squares = sums.dd.sum() - np.cumsum(values)
    return Best(coordinates, gamma, float(squares[rank - 1])), squares


def alternate(found: Subspace, sums: Sums, gamma: Matrix, rank: int, *, loss: float) -> Best:
    """Return the best update and γ that turns of one and the other lead to.

    No turn makes the error larger. They end when one lowers it by less than `loss` of it.
    """
    best: Best | None = None
    for _ in range(max(_TURNS[0], _TURNS[1] // found.difference.shape[1])):
        coordinates, _ = top(found, gamma, rank)
        gamma, squares = _gains(found, sums, gamma, coordinates)
        before, best = best, Best(coordinates, gamma, float(squares.sum()))
        if before is not None and before.squares - best.squares <= loss * before.squares:
            break
    assert best is not None
    return best


def _gains(
    found: Subspace, sums: Sums, gamma: Matrix, coordinates: Matrix
) -> tuple[Matrix, Matrix]:
    """Return the best γ for an A, and the squared error of each row.

    With d⊥ = d − (d Aᵀ) A and w⊥ likewise, the row's error is ‖d⊥ − γ w⊥‖: a parabola in γ.
    """
    da, wa = (part @ coordinates.T for part in (found.difference, found.weight))  # (out, rank)
    apart = Sums(
        sums.dd - np.sum(da * da, axis=1),
        sums.dw - np.sum(da * wa, axis=1),
        sums.ww - np.sum(wa * wa, axis=1),
    )
    free = apart.ww > _ALONG * sums.ww
    gamma = np.divide(apart.dw, apart.ww, out=gamma.copy(), where=free)
    gamma = np.clip(gamma, _LEAST - 1, _MOST - 1)
    return gamma, apart.squares(gamma)
