"""Numbers with a bound on their rounding errors.

    value  the number in float64        error  the bound in units of u, a dtype's unit roundoff

Evaluate a formula on `Rounded` arrays. Then `u · error` bounds, to first order in u, the error of
the same formula evaluated in that dtype. The bound holds for any order of summation, and for any
association of the products that has the same terms. A sum of k products adds k roundings of their
absolute values, and every other operation adds one. A Python number adds one more, because it is
first rounded to the dtype. `narrowed` adds a rounding to a narrower dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

Precision: TypeAlias = Literal["exact", "mixed"]
"""The numbers that a layer of 16 bits rounds to its storage dtype: x, dy and W, or more of them."""
Wide: TypeAlias = NDArray[np.float64]
UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@dataclass(frozen=True, eq=False)
class Rounded:
    """An array with an error bound; the operators are NumPy's."""

    value: Wide
    error: Wide

    __array_ufunc__ = None  # NumPy's arrays leave the operators to this class

    @classmethod
    def exact(cls, values: Any) -> Self:
        """Return an input, which has no error."""
        wide = np.asarray(values, np.float64)
        return cls(wide, np.zeros_like(wide))

    @staticmethod
    def product(a: Wide, b: Wide) -> Wide:
        """Return the products of matrices. The BLAS chooses the order of the sums."""
        return a @ b

    def __matmul__(self, other: Rounded) -> Self:
        size, others = np.abs(self.value), np.abs(other.value)
        terms = self.value.shape[-1]
        error = (
            self.product(size, other.error)
            + self.product(self.error, others)
            + terms * self.product(size, others)
        )
        return type(self)(self.product(self.value, other.value), error)

    def __mul__(self, other: Rounded | float) -> Self:
        other = _operand(other)
        value = self.value * other.value
        error = self.error * np.abs(other.value) + np.abs(self.value) * other.error
        return type(self)(value, error + np.abs(value))

    __rmul__ = __mul__

    def __add__(self, other: Rounded | float) -> Self:
        other = _operand(other)
        value = self.value + other.value
        return type(self)(value, self.error + other.error + np.abs(value))

    __radd__ = __add__

    def __neg__(self) -> Self:
        return type(self)(-self.value, self.error)

    def __sub__(self, other: Rounded | float) -> Self:
        return self + (-other)

    def __abs__(self) -> Self:
        return type(self)(np.abs(self.value), self.error)

    def __getitem__(self, index: Any) -> Self:
        return type(self)(self.value[index], self.error[index])

    def where(self, mask: Any, other: Rounded | float) -> Self:
        """Return these numbers where `mask` is true, and those of `other` elsewhere."""
        other = _operand(other)
        value = np.where(mask, self.value, other.value)
        return type(self)(value, np.where(mask, self.error, other.error))

    def narrowed(self, roundoff: float, least: float, unit: float) -> Self:
        """Return the number after one more rounding, to a narrower dtype.

        ::

            u error ← u error + max(roundoff (|value| + u error), least)

        Parameters
        ----------
        roundoff : float
            The unit roundoff of the narrower dtype.
        least : float
            The largest error that this dtype makes below its normal range.
        unit : float
            u, the unit roundoff of the dtype in which the formula is evaluated.
        """
        largest = np.abs(self.value) + unit * self.error
        return type(self)(self.value, self.error + np.maximum(roundoff * largest, least) / unit)

    @property
    def mT(self) -> Self:  # noqa: N802
        """The transpose of each matrix."""
        return type(self)(self.value.swapaxes(-1, -2), self.error.swapaxes(-1, -2))

    def reshape(self, *shape: int) -> Self:
        """Return the same numbers in another shape."""
        return type(self)(self.value.reshape(shape), self.error.reshape(shape))

    def sum(self, axis: int, keepdims: bool = False) -> Self:
        """Return the sum along an axis."""
        terms = self.value.shape[axis]
        value = self.value.sum(axis=axis, keepdims=keepdims)
        error = (self.error + terms * np.abs(self.value)).sum(axis=axis, keepdims=keepdims)
        return type(self)(value, error)

    def over(self, other: Rounded) -> Self:
        """Return the quotient, and 0 where the divisor is 0."""
        nonzero = other.value != 0
        divisor = np.where(nonzero, other.value, 1.0)
        value = np.where(nonzero, self.value / divisor, 0.0)
        error = (self.error + np.abs(value) * other.error) / np.abs(divisor) + np.abs(value)
        return type(self)(value, np.where(nonzero, error, 0.0))

    def sqrt(self) -> Self:
        """Return the root."""
        value = np.sqrt(self.value)
        half = np.divide(self.error, 2 * value, out=np.zeros_like(value), where=value > 0)
        return type(self)(value, half + value)

    def divided_by(self, gram: Rounded, damping: float) -> Self:
        """Return (G + δI)⁻¹ C for a positive definite G (k, k) and these numbers C (k, j).

        Every stable way of solution has an error of |G⁻¹| (E_C + E_G |X| + 3k² |G| |X|).
        """
        one = np.eye(len(gram.value))
        damped = gram.value + damping * one
        inverse = _inverse(damped)
        value = self.product(inverse, self.value)
        size, terms = np.abs(value), len(damped)
        roundings = gram.error + damping * one + (3 * terms**2 + 1) * np.abs(damped)
        error = self.error + self.product(roundings, size)
        return type(self)(value, self.product(np.abs(inverse), error))

    def norms(self, axis: int = -1) -> Self:
        """Return √Σ v² along an axis, which is kept. Errors of v change it by at most ‖error‖."""
        terms = self.value.shape[axis]
        value = lengths(self.value, axis)
        return type(self)(value, lengths(self.error, axis) + (terms / 2 + 1) * value)


class Portable(Rounded):
    """`Rounded` numbers that are equal to the last bit on every machine: it uses no BLAS."""

    @staticmethod
    def product(a: Wide, b: Wide) -> Wide:
        """Return the products of matrices, as sums of outer products in a fixed order."""
        total = np.zeros((*a.shape[:-1], b.shape[-1]))
        for k in range(a.shape[-1]):
            total += a[..., k, None] * b[..., k, None, :]
        return total


class Plain(np.ndarray[Any, Any]):
    """A NumPy array with the methods of `Rounded`, to evaluate the formulas in its own dtype."""

    def over(self, other: Any) -> Any:
        """Return the quotient, and 0 where the divisor is 0."""
        zeros = np.zeros_like(self, shape=np.broadcast_shapes(self.shape, np.shape(other)))
        return np.divide(self, other, out=zeros, where=other != 0)

    def divided_by(self, gram: Any, damping: float) -> Any:
        """Return (G + δI)⁻¹ C for these numbers C."""
        return np.linalg.solve(gram + damping * np.eye(len(gram), dtype=gram.dtype), self)

    def sqrt(self) -> Any:
        """Return the root."""
        return np.sqrt(self)

    def norms(self, axis: int = -1) -> Any:
        """Return √Σ v² along an axis, which is kept."""
        return lengths(self, axis)


def lengths(values: Any, axis: int = -1) -> Any:
    """Return √Σ v² along an axis, which is kept. The squares do not overflow or underflow."""
    peak = np.max(np.abs(values), axis=axis, keepdims=True)
    unit = values / np.where(peak > 0, peak, peak.dtype.type(1))
    return peak * np.sqrt(np.sum(unit * unit, axis=axis, keepdims=True))


def _inverse(gram: Wide) -> Wide:
    """Return the inverse of a positive definite matrix, by Gauss and Jordan in a fixed order."""
    size = len(gram)
    both = np.concatenate([gram, np.eye(size)], axis=1)
    for k in range(size):
        both[k] /= both[k, k]
        for row in range(size):
            if row != k:
                both[row] -= both[row, k] * both[k]
    return both[:, size:]


def _operand(other: Rounded | float) -> Rounded:
    if isinstance(other, Rounded):
        return other
    number = np.asarray(other, np.float64)
    return Rounded(number, np.abs(number))
