"""A guard against a wrong match: the row norms of a base are near the magnitudes of its adapter.

m begins as ‖W‖ by rows, and training moves it little. So an m that is far from ‖W‖ of the tensor
that it was matched to, and near that of another one, shows that the match is wrong.

    d = ‖m − n‖ / ‖n‖        n = ‖W‖ by rows
    c = the correlation of n and n − m

The m of a right match has moved away from n in some direction, and a match is refused only if no
random direction does it. In N dimensions, a random step of length ρ ends within R of one of k
points with a probability of at most k (R/ρ)^(N−1), and its correlation with n is c or more with
one of at most (1 − c²)^((N−2)/2)::

    the norms of another tensor     k = the tensors of that shape
    the own norms in another order  k = N!; or by c, which is 1/√2 in the mean for a random order

So in one merge, with all its modules, the probability of a false alarm is at most 10⁻⁶.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from doraxp._core.kinds import LayerKind
from doraxp.checkpoint._engine import Reused
from doraxp.checkpoint._matrix import row_blocks, source_rows
from doraxp.checkpoint._safetensors import DTYPES, Source
from doraxp.checkpoint._tasks import MergedTensor

_ROWS = 16
"""Rows of a sample; a matrix with fewer is not looked at."""
_LARGEST = 64 << 20
"""Bytes of the largest weight that is read as a whole, because its matrix is stored transposed."""
_NEAR, _FACTOR = 0.05, 3.0
"""The largest d of a tensor that fits, and how many times as large that of a wrong match is."""
_TRAINED = 0.2
"""The largest d of another tensor that fits: m may have been trained this far from its norms."""
_SAME, _OTHER = 0.8, 0.5
"""The least correlation of m and n of a tensor that fits, and the largest of a wrong match."""
_CHANCE = 1e-6
"""The probability of a false alarm in one merge."""

Vector = NDArray[np.float64]


class _Fit(NamedTuple):
    """How far m is from the norms of a tensor."""

    distance: float
    correlation: float
    change: float
    """c."""
    rows: int

    @classmethod
    def of(cls, m: Vector, norms: Vector) -> _Fit:
        """Compare them; the correlation of a constant counts as 0."""
        length = float(np.linalg.norm(norms))
        distance = float(np.linalg.norm(m - norms)) / length if length > 0 else np.inf
        one, other = m - m.mean(), norms - norms.mean()
        scale = float(np.linalg.norm(one) * np.linalg.norm(other))
        correlation = float(one @ other) / scale if scale > 0 else 0.0
        change, spread = other - one, float(np.linalg.norm(other))
        scale = float(np.linalg.norm(change)) * spread
        return cls(
            distance, correlation, float(change @ other) / scale if scale > 0 else 0.0, len(m)
        )

    def is_better_than(self, own: _Fit, near: float) -> bool:
        """Return whether this tensor fits, within `near`, and the own one does not."""
        return (
            self.distance <= min(near, own.distance / _FACTOR)
            and self.correlation >= _SAME
            and own.correlation <= _OTHER
        )

    def chance(self, own: _Fit, ways: float) -> float:
        """Return ln of the chance that a right m is so near to one of exp(`ways`) points."""
        near = self.distance / own.distance
        return ways + (self.rows - 1) * math.log(near) if near > 0 else -math.inf

    def chance_of_order(self) -> float:
        """Return ln of the chance that a right m has moved so much against its own norms."""
        return (self.rows - 2) / 2 * math.log1p(-(min(max(self.change, 0.0), 1 - 1e-12) ** 2))


def wrong_matches(
    parts: Iterable[tuple[str, MergedTensor]],
    sources: Mapping[str, Source],
) -> Iterator[str]:
    """Yield a message for each module whose magnitudes are those of another tensor.

    Parameters
    ----------
    parts : iterable of (str, MergedTensor)
        The name of each tensor, and the part that is merged into it.
    sources : mapping of str to Source
        All tensors of the base.
    """
    parts = list(parts)
    guard = _Guard(sources, math.log(_CHANCE / max(1, len(parts))))
    for name, part in parts:
        stack = part.layer.kind.matrix_shape(part.layer.shape)[:-2]
        if stack or not _is_readable(part.source, part.layer.kind):
            continue
        m = part.adapters.magnitude(part.layer)
        if m is not None and len(m) >= _ROWS:
            message = guard.message(name, part, np.abs(m.astype(np.float64)))
            if message is not None:
                yield message


def residual_fits(parts: Iterable[MergedTensor]) -> bool | None:
    """Return whether m is near ‖W + s ΔW‖ rather than ‖W‖; None if neither is near.

    PiSSA and OLoRA start from ``W_residual + s B A = W`` and ``m = ‖W‖``. So it is True for the
    residual base, and False for the one before the initialisation.
    """
    plain, whole = [], []
    for part in parts:
        layer = part.read()
        m = layer.magnitude
        if m is None or not _is_readable(part.source, layer.kind):
            continue
        rows = _sample(len(m))
        weight = source_rows(part.source, rows, layer.kind)
        v = weight + layer.update_rows(rows)
        plain.append(_Fit.of(np.abs(m[rows]), np.linalg.norm(weight, axis=1)).distance)
        whole.append(_Fit.of(np.abs(m[rows]), np.linalg.norm(v, axis=1)).distance)
    if not plain:
        return None
    of_weight, of_v = float(np.median(plain)), float(np.median(whole))
    near, far = sorted((of_weight, of_v))
    return of_v < of_weight if near <= min(_NEAR, far / _FACTOR) else None


def nearest_by_norms(m: Vector, kind: LayerKind, sources: Mapping[str, Source]) -> str | None:
    """Return the tensor whose row norms are nearest to m; None if those of all are far from it."""
    best, name = _NEAR, None
    for other, source in sources.items():
        if source.tensor.dtype in DTYPES and _is_readable(source, kind):
            distance = _Fit.of(m, _norms(source, kind, np.arange(len(m)))).distance
            if distance < best:
                best, name = distance, other
    return name


class _Guard:
    """The norms of a base's tensors, each computed once."""

    def __init__(self, sources: Mapping[str, Source], limit: float) -> None:
        self._sources, self._limit = sources, limit
        self._samples: dict[tuple[tuple[int, ...], LayerKind], tuple[list[str], Vector]] = {}

    def message(self, name: str, part: MergedTensor, m: Vector) -> str | None:
        """Return the reason why a match is wrong; None if it is not known to be."""
        kind, rows = part.layer.kind, _sample(len(m))
        own = _Fit.of(m[rows], _norms(part.source, kind, rows))
        if own.distance <= _NEAR:
            return None
        norms = _norms(part.source, kind, np.arange(len(m)))
        own = _Fit.of(m, norms)
        # The distance in a sample may be twice that of all rows.
        limit = 2 * min(_TRAINED, own.distance / _FACTOR)
        like, near = self._like(part.source.tensor.shape, kind, m, limit)
        ways = math.log(max(1, like))
        other = next(
            (one for one in near if one != name and self._fits(one, kind, m, own, ways)), None
        )
        if other is not None:
            return (
                f"{part.path} was matched to {name}, but its magnitudes are the row norms of "
                f"{other}: name that one with --rename"
            )
        # No model stores the dimensions of its embeddings in another order.
        in_order = _Fit.of(np.sort(m), np.sort(norms))
        chance = min(own.chance_of_order(), in_order.chance(own, math.lgamma(len(m) + 1)))
        is_sorted_near = in_order.is_better_than(own, _NEAR) and chance <= self._limit - math.log(2)
        if is_sorted_near and not kind.is_transposed:
            return (
                f"{part.path} was matched to {name}, but its magnitudes are the row norms of that "
                "tensor in another order: BASE stores the rows in another order than the module"
            )
        return None

    def _like(
        self, shape: tuple[int, ...], kind: LayerKind, m: Vector, limit: float
    ) -> tuple[int, list[str]]:
        """Return the number of tensors of a shape, and those near m in the rows of a sample."""
        rows = _sample(len(m))
        if (shape, kind) not in self._samples:
            like = [
                name
                for name, source in self._sources.items()
                if source.tensor.dtype in DTYPES and source.tensor.shape == shape
            ]
            found = [_norms(self._sources[name], kind, rows) for name in like]
            self._samples[shape, kind] = like, np.reshape(found, (len(like), len(rows)))
        like, norms = self._samples[shape, kind]
        with np.errstate(over="ignore", invalid="ignore"):  # the merge refuses NaN and infinity
            off = np.linalg.norm(norms - m[rows], axis=1)
            near = off <= limit * np.linalg.norm(norms, axis=1)
        return len(like), [like[place] for place in np.flatnonzero(near).tolist()]

    def _fits(self, name: str, kind: LayerKind, m: Vector, own: _Fit, ways: float) -> bool:
        fit = _Fit.of(m, _norms(self._sources[name], kind, np.arange(len(m))))
        return fit.is_better_than(own, _TRAINED) and fit.chance(own, ways) <= self._limit


def _sample(size: int) -> NDArray[np.intp]:
    """Return rows side by side, in the middle: one read."""
    first = max(0, (size - _ROWS) // 2)
    return np.arange(first, min(size, first + _ROWS))


def _is_readable(source: Source, kind: LayerKind) -> bool:
    return not kind.is_transposed or source.tensor.nbytes <= _LARGEST


def _norms(source: Source, kind: LayerKind, rows: NDArray[np.intp]) -> Vector:
    """Return ‖W‖ of some rows that are side by side, block by block."""
    # Squares of 16-bit numbers lose nothing in float32 that counts here, and take far less time.
    narrow = DTYPES[source.tensor.dtype].itemsize == 2
    dtype, first = np.dtype(np.float32 if narrow else np.float64), int(rows[0])
    with np.errstate(over="ignore", invalid="ignore"):  # the merge refuses NaN and infinity
        if kind.is_transposed:
            return np.asarray(np.linalg.norm(source_rows(source, rows, kind), axis=1))
        norms, memory, wide = [], Reused(), Reused()
        for block in row_blocks((len(rows), *source.tensor.shape[1:])):
            part = source.read(slice(first + block.start, first + block.stop), memory)
            own = wide.cast(part.reshape(len(part), -1), dtype)
            norms.append(np.sqrt(np.vecdot(own, own)).astype(np.float64))
    return np.concatenate(norms)
