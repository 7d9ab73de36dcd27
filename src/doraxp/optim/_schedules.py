"""Learning rates that change with the step: functions from an int to a float.

    t  step, from 0    w  warmup_steps    T  total_steps    η  learning_rate    φ  final

Steps are counted from 0: step t is taken at the rate `schedule(t)`. All schedules warm up alike::

    η (t + 1) / (w + 1)      for t < w

The first rate is above 0, and step w is the first at the full rate. A schedule that decays reaches
φ at step T, the first after training, and stays there: with φ = 0, step T − 1 still learns.

Schedules run on the host. Under a compiler that traces, pass their result to the traced function
as an argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

from doraxp._base.scalars import check_count, check_number

Schedule: TypeAlias = Callable[[int], float]


def constant_schedule(learning_rate: float, *, warmup_steps: int = 0) -> Schedule:
    """Return t ↦ η after the warm-up.

    Parameters
    ----------
    learning_rate : float
        η, at least 0.
    warmup_steps : int
        w, at least 0.

    Returns
    -------
    callable, int -> float

    Raises
    ------
    TypeError
        A count is not an integer, or η is not a number. The schedule raises it for its step.
    ValueError
        A number is out of range. The schedule raises it for a negative step.

    Examples
    --------
    >>> schedule = constant_schedule(0.5, warmup_steps=1)
    >>> [schedule(step) for step in range(3)]
    [0.25, 0.5, 0.5]
    """
    rate = check_number("learning_rate", learning_rate)
    return _warmed_up(rate, check_count("warmup_steps", warmup_steps), lambda _: rate)


def linear_schedule(
    learning_rate: float, *, total_steps: int, warmup_steps: int = 0, final: float = 0.0
) -> Schedule:
    """Return t ↦ η (1 − u) + φ u with u = (t − w) / (T − w), after the warm-up.

    Parameters
    ----------
    learning_rate : float
        η, at least 0.
    total_steps : int
        T, at least 1. It includes the warm-up.
    warmup_steps : int
        w, in 0 ≤ w ≤ T.
    final : float
        φ, at least 0: a rate, not a fraction of η.

    Returns
    -------
    callable, int -> float

    Raises
    ------
    TypeError
        A count is not an integer, or a rate is not a number. The schedule raises it for its step.
    ValueError
        A number is out of range. The schedule raises it for a negative step.

    Examples
    --------
    >>> schedule = linear_schedule(1.0, total_steps=5, warmup_steps=1)
    >>> [schedule(step) for step in range(7)]
    [0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    return _decaying(learning_rate, warmup_steps, total_steps, final, lambda u: 1 - u)


def cosine_schedule(
    learning_rate: float, *, total_steps: int, warmup_steps: int = 0, final: float = 0.0
) -> Schedule:
    """Return t ↦ φ + (η − φ) (1 + cos πu) / 2 with u = (t − w) / (T − w), after the warm-up.

    Parameters
    ----------
    learning_rate : float
        η, at least 0.
    total_steps : int
        T, at least 1. It includes the warm-up.
    warmup_steps : int
        w, in 0 ≤ w ≤ T.
    final : float
        φ, at least 0: a rate, not a fraction of η.

    Returns
    -------
    callable, int -> float

    Raises
    ------
    TypeError
        A count is not an integer, or a rate is not a number. The schedule raises it for its step.
    ValueError
        A number is out of range. The schedule raises it for a negative step.

    References
    ----------
    arXiv:1608.03983, equation 5, without restarts.

    Examples
    --------
    >>> schedule = cosine_schedule(1.0, total_steps=5, warmup_steps=1)
    >>> [round(schedule(step), 3) for step in range(7)]
    [0.5, 1.0, 0.854, 0.5, 0.146, 0.0, 0.0]
    """
    return _decaying(
        learning_rate, warmup_steps, total_steps, final, lambda u: (1 + math.cos(math.pi * u)) / 2
    )


def _decaying(
    learning_rate: float,
    warmup_steps: int,
    total_steps: int,
    final: float,
    shape: Callable[[float], float],
) -> Schedule:
    """Return the schedule from η to φ along `shape`, which falls from 1 at u = 0 to 0 at 1."""
    peak = check_number("learning_rate", learning_rate)
    final = check_number("final", final)
    warmup = check_count("warmup_steps", warmup_steps)
    total = check_count("total_steps", total_steps, least=1)
    if warmup > total:
        raise ValueError(f"warmup_steps must be at most total_steps = {total}, got {warmup}")

    def decayed(step: int) -> float:
        if step >= total:
            return final
        weight = shape((step - warmup) / (total - warmup))
        return peak * weight + final * (1 - weight)

    return _warmed_up(peak, warmup, decayed)


def _warmed_up(learning_rate: float, warmup: int, after: Schedule) -> Schedule:
    """Return the schedule that warms up to η and then follows `after`."""

    def schedule(step: int) -> float:
        step = check_count("step", step)
        if step < warmup:
            return learning_rate * (step + 1) / (warmup + 1)
        return after(step)

    return schedule
