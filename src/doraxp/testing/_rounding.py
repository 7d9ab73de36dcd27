"""Numbers with the rounding error that they may carry: a value in float64, and a bound.

    value  what the formula gives        error  in units of u, the unit roundoff of some dtype

Evaluate a formula on `Rounded` arrays, and `u · error` bounds, to first order in u, how far the
same formula evaluated in that dtype can be off: any order of summation, any association of the
products that has the same terms. A sum of k products adds k roundings of their absolute values,
every other operation one, a Python number one more (it is rounded to the dtype first).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Wide: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Rounded:
    """An array with an error bound; the operators are NumPy's."""

    value: Wide
    error: Wide

    __array_ufunc__ = None  # NumPy's arrays leave the operators to this class

    @staticmethod
    def exact(values: Any) -> Rounded:
        """Return an input: it has no error."""
        wide = np.asarray(values, np.float64)
        return Rounded(wide, np.zeros_like(wide))

    def __matmul__(self, other: Rounded) -> Rounded:
        size, others = np.abs(self.value), np.abs(other.value)
        terms = self.value.shape[-1]
        error = size @ other.error + self.error @ others + terms * (size @ others)
        return Rounded(self.value @ other.value, error)

    def __mul__(self, other: Rounded | float) -> Rounded:
        other = _operand(other)
        value = self.value * other.value
        error = self.error * np.abs(other.value) + np.abs(self.value) * other.error
        return Rounded(value, error + np.abs(value))

    __rmul__ = __mul__

    def __add__(self, other: Rounded | float) -> Rounded:
        other = _operand(other)
        value = self.value + other.value
        return Rounded(value, self.error + other.error + np.abs(value))

    __radd__ = __add__

    def __neg__(self) -> Rounded:
        return Rounded(-self.value, self.error)

    def __sub__(self, other: Rounded | float) -> Rounded:
        return self + (-other)

    def __abs__(self) -> Rounded:
        return Rounded(np.abs(self.value), self.error)

    def __getitem__(self, index: Any) -> Rounded:
        return Rounded(self.value[index], self.error[index])

    @property
    def mT(self) -> Rounded:  # noqa: N802
        """The transpose of each matrix."""
        return Rounded(self.value.swapaxes(-1, -2), self.error.swapaxes(-1, -2))

    def reshape(self, *shape: int) -> Rounded:
        """Return the same numbers in another shape."""
        return Rounded(self.value.reshape(shape), self.error.reshape(shape))

    def sum(self, axis: int, keepdims: bool = False) -> Rounded:
        """Return the sum along an axis."""
        terms = self.value.shape[axis]
        value = self.value.sum(axis=axis, keepdims=keepdims)
        error = (self.error + terms * np.abs(self.value)).sum(axis=axis, keepdims=keepdims)
        return Rounded(value, error)

    def over(self, other: Rounded) -> Rounded:
        """Return the quotient, and 0 where the divisor is 0."""
        nonzero = other.value != 0
        divisor = np.where(nonzero, other.value, 1.0)
        value = np.where(nonzero, self.value / divisor, 0.0)
        error = (self.error + np.abs(value) * other.error) / np.abs(divisor) + np.abs(value)
        return Rounded(value, np.where(nonzero, error, 0.0))

    def sqrt(self) -> Rounded:
        """Return the root."""
        value = np.sqrt(self.value)
        half = np.divide(self.error, 2 * value, out=np.zeros_like(value), where=value > 0)
        return Rounded(value, half + value)

    def norms(self, axis: int = -1) -> Rounded:
        """Return √Σ v² along an axis, which is kept. It moves by no more than ‖error‖."""
        terms = self.value.shape[axis]
        value = lengths(self.value, axis)
        return Rounded(value, lengths(self.error, axis) + (terms / 2 + 1) * value)


class Plain(np.ndarray[Any, Any]):
    """An array of NumPy with the names that `Rounded` has: the formulas in the dtype itself."""

    def over(self, other: Any) -> Any:
        """Return the quotient, and 0 where the divisor is 0."""
        return np.divide(self, other, out=np.zeros_like(self), where=other != 0)

    def sqrt(self) -> Any:
        """Return the root."""
        return np.sqrt(self)

    def norms(self, axis: int = -1) -> Any:
        """Return √Σ v² along an axis, which is kept."""
        return lengths(self, axis)


def lengths(values: Any, axis: int = -1) -> Any:
    """Return √Σ v² along an axis, which is kept, whatever the size of the numbers."""
    peak = np.max(np.abs(values), axis=axis, keepdims=True)
    unit = values / np.where(peak > 0, peak, peak.dtype.type(1))
    return peak * np.sqrt(np.sum(unit * unit, axis=axis, keepdims=True))


def _operand(other: Rounded | float) -> Rounded:
    if isinstance(other, Rounded):
        return other
    number = np.asarray(other, np.float64)
    return Rounded(number, np.abs(number))
