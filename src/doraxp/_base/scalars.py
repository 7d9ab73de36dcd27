"""Checks of public arguments that are not arrays.

Each error names the argument, the rule and the value.
"""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any


def check_kind(name: str, value: Any, kind: type) -> None:
    """Raise TypeError unless `value` is an instance of `kind`."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be of type {kind.__name__}, got {type(value).__name__}")


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is a bool. Truthiness is not enough: `'no'` is truthy."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_count(name: str, value: Any, *, least: int = 0) -> int:
    """Return `value` as a Python int. Refuse other types, and integers below `least`."""
    message = f"{name} must be an integer, got {value!r}"
    if isinstance(value, bool):
        raise TypeError(message)
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(message) from None
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {count}")
    return count


def check_real(name: str, value: Any, *, rule: str = "a number") -> float:
    """Return `value` as a Python float; an int that is too large for a float becomes inf."""
    if value.__class__ is float:  # most often; the search below takes longer than all else here
        return float(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {rule}, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def check_number(
    name: str, value: Any, *, below: float = math.inf, positive: bool = False
) -> float:
    """Return a hyperparameter as a Python float: a NumPy scalar would widen float32 arrays."""
    number = check_real(name, value)
    if not 0 <= number < below or (positive and number == 0):
        least = "above" if positive else "at least"
        most = "finite" if below == math.inf else f"below {below}"
        raise ValueError(f"{name} must be {least} 0 and {most}, got {number}")
    return number
