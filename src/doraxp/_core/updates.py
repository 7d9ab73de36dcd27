"""Updates: anything that gives rows of ΔW, block by block, without storing all of ΔW.

::

    ΔW (out, in)  is
    LowRank       B A                       A (rank, in)   B (out, rank)
    Hadamard      (B₁ A₁) ⊙ (B₂ A₂)         LoHa, arXiv:2108.06098
    Kronecker     C ⊗ U                     LoKr, arXiv:2212.10650
                                            C (p, q)   U (out/p, in/q), itself an update
    Difference    D                         D (out, in)

The rows are those of the weight as it is stored, flat after its first axis: a convolution of
(out, in, *kernel) has in·kernel columns. A Tucker core, as image trainers have it for convolutions,
makes a factor A of its own: see `with_core`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

from doraxp._base.types import Array, Config
from doraxp._base.words import counted
from doraxp._core.decomposition import inverse_norms
from doraxp._core.kinds import LayerKind
from doraxp.backends import array_namespace, as_dtype, compute_dtype, operations

Mapped: TypeAlias = Callable[[Array], Array]
"""Returns an array in place of another one, such as a copy in another dtype."""


@runtime_checkable
class Update(Protocol):
    """An update ΔW of a weight."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of ΔW."""

    def rows(self, rows: slice) -> Array:
        """Return some rows of ΔW, (k, in); `rows` has a start and a stop."""

    def scaled(self, factor: float) -> Update:
        """Return factor · ΔW as an update."""

    def mapped(self, function: Mapped) -> Update:
        """Return the update whose arrays are `function` of those of this one."""


class LowRank(NamedTuple):
    """ΔW = B A.

    Examples
    --------
    >>> import numpy as np
    >>> update = LowRank(np.array([[1.0, 2.0]]), np.array([[3.0], [0.0], [1.0]]))
    >>> update.shape, update.rows(slice(0, 2)).tolist()
    ((3, 2), [[3.0, 6.0], [0.0, 0.0]])
    """

    lora_a: Array
    """A, (rank, in)."""
    lora_b: Array
    """B, (out, rank)."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of ΔW."""
        return self.lora_b.shape[0], self.lora_a.shape[1]

    def rows(self, rows: slice) -> Array:
        """Return some rows of B A, (k, in)."""
        return self.lora_b[rows, :] @ self.lora_a

    def scaled(self, factor: float) -> LowRank:
        """Return factor · B A, with the factor in B."""
        return self._replace(lora_b=factor * self.lora_b)

    def mapped(self, function: Mapped) -> LowRank:
        """Return the update of `function` of A and B."""
        return LowRank(function(self.lora_a), function(self.lora_b))


class Hadamard(NamedTuple):
    """ΔW = (B₁ A₁) ⊙ (B₂ A₂), of rank up to rank₁ · rank₂.

    References
    ----------
    arXiv:2108.06098; as LoHa in LyCORIS, arXiv:2309.14859.
    """

    first: LowRank
    second: LowRank

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of ΔW."""
        return self.first.shape

    def rows(self, rows: slice) -> Array:
        """Return some rows of ΔW, (k, in)."""
        return self.first.rows(rows) * self.second.rows(rows)

    def scaled(self, factor: float) -> Hadamard:
        """Return factor · ΔW, with the factor in B₁."""
        return self._replace(first=self.first.scaled(factor))

    def mapped(self, function: Mapped) -> Hadamard:
        """Return the update of `function` of all factors."""
        return Hadamard(self.first.mapped(function), self.second.mapped(function))


class Kronecker(NamedTuple):
    """ΔW = C ⊗ U: row i·k + j of ΔW, with k = out/p, is row i of C times row j of U.

    References
    ----------
    arXiv:2212.10650; as LoKr in LyCORIS, arXiv:2309.14859.
    """

    left: Array
    """C, (p, q)."""
    right: Update
    """U, (out/p, in/q)."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of ΔW."""
        (p, q), (out, inner) = self.left.shape, self.right.shape
        return p * out, q * inner

    def rows(self, rows: slice) -> Array:
        """Return some rows of ΔW, (k, in)."""
        xp = array_namespace(self.left)
        height, parts, start = self.right.shape[0], [], rows.start
        while start < rows.stop:
            row, first = divmod(start, height)
            last = min(height, first + rows.stop - start)
            below = self.right.rows(slice(first, last))  # (l, in/q)
            pairs = self.left[row, :][None, :, None] * below[:, None, :]  # (l, q, in/q)
            parts.append(xp.reshape(pairs, (last - first, self.shape[1])))
            start += last - first
        return parts[0] if len(parts) == 1 else xp.concat(parts)

    def scaled(self, factor: float) -> Kronecker:
        """Return factor · ΔW, with the factor in C."""
        return self._replace(left=factor * self.left)

    def mapped(self, function: Mapped) -> Kronecker:
        """Return the update of `function` of C and of the arrays of U."""
        return Kronecker(function(self.left), self.right.mapped(function))


class Difference(NamedTuple):
    """ΔW as a matrix."""

    difference: Array
    """(out, in)."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of ΔW."""
        out, inner = self.difference.shape
        return out, inner

    def rows(self, rows: slice) -> Array:
        """Return some rows of ΔW, (k, in)."""
        return self.difference[rows, :]

    def scaled(self, factor: float) -> Difference:
        """Return factor · ΔW."""
        return Difference(factor * self.difference)

    def mapped(self, function: Mapped) -> Difference:
        """Return the update of `function` of ΔW."""
        return Difference(function(self.difference))


class UpdateAdapter(NamedTuple):
    """An adapter whose update may be of any kind, and whose magnitude may be left out.

    ::

        with m       W' = (m / n)⊙V        V = W + s ΔW
        without m    W' = V                plain LoRA, LoHa or LoKr
    """

    update: Update
    """ΔW, in the layout of the stored weight."""
    magnitude: Array | None = None
    """m, a number for each row of the matrix of the layer's kind."""


def merge_update(weight: Array, adapter: UpdateAdapter, config: Config, kind: LayerKind) -> Array:
    """Return W' for an update of any kind, in weight's shape and dtype; see `doraxp.merge`."""
    update, m = adapter
    arrays = _arrays(update)
    arrays |= {} if m is None else {"magnitude": m}
    ops = operations(weight=weight, **arrays)
    xp, shape = ops.xp, tuple(weight.shape)
    rows = kind.matrix_shape(shape)[:-1]
    flat = (math.prod(shape[:-1]), shape[-1]) if kind.is_stack else (shape[0], math.prod(shape[1:]))
    _check(update, m, config, shape, flat, rows)
    dtype = compute_dtype(weight, *arrays.values(), xp=xp)
    matrix = as_dtype(kind.matrix(ops.whole(weight)), dtype, xp=xp)
    if config.form == "direction":
        squares = ops.row_squares(matrix, dtype)
        matrix = inverse_norms(matrix, squares, ops=ops)[..., None] * matrix
    own = update.mapped(lambda array: as_dtype(array, dtype, xp=xp)).scaled(config.scaling)
    delta = xp.reshape(own.rows(slice(0, flat[0])), shape)
    v = matrix + kind.matrix(delta)
    if m is not None:
        n = ops.row_norms(v, ops.row_squares(v, dtype))
        v = ops.over_norm(xp.reshape(as_dtype(m, dtype, xp=xp), rows), n)[..., None] * v
    return as_dtype(kind.restore(v, shape), weight.dtype, xp=xp)


def _arrays(update: Update) -> dict[str, Array]:
    """Return the arrays of an update, with names for errors."""
    found: list[Array] = []

    def collect(array: Array) -> Array:
        found.append(array)
        return array

    update.mapped(collect)
    return {f"array {place} of the update": array for place, array in enumerate(found)}


def _check(
    update: Update,
    m: Array | None,
    config: Config,
    shape: tuple[int, ...],
    flat: tuple[int, int],
    rows: tuple[int, ...],
) -> None:
    if tuple(update.shape) != flat:
        raise ValueError(
            f"an update of a weight of shape {shape} must have shape {flat}, got "
            f"{tuple(update.shape)}"
        )
    if m is None and config.form == "direction":
        raise ValueError("an adapter of the direction form must have a magnitude, got None")
    if m is not None and math.prod(m.shape) != math.prod(rows):
        raise ValueError(
            f"magnitude must have a number for each of {counted(math.prod(rows), 'row')}, got "
            f"shape {tuple(m.shape)}"
        )


def with_core(core: Array, lora_a: Array) -> Array:
    """Return the factor A of a convolution whose update has a Tucker core.

    ::

        ΔW[o, i, k] = Σ_r B[o, r] A[r, i, k]        A[r, i, k] = Σ_q core[r, q, k] lora_a[q, i]

    Parameters
    ----------
    core : array, shape (rank, rank, *kernel)
    lora_a : array, shape (rank, in)

    Returns
    -------
    array, shape (rank, in·kernel)
    """
    xp = array_namespace(core)
    rank, inner = core.shape[0], lora_a.shape[1]
    flat = xp.reshape(core, (rank, core.shape[1], -1))  # (rank, rank, kernel)
    by_input = xp.matrix_transpose(flat) @ lora_a  # (rank, kernel, in)
    return xp.reshape(xp.matrix_transpose(by_input), (rank, inner * flat.shape[2]))
