"""Learning rates that change with the step: a `Schedule` is called with an int, for a float.

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
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

from doraxp._base.scalars import check_count, check_kind, check_number

Kind: TypeAlias = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """A learning rate that changes with the step: t ↦ η(t).

    `constant_schedule`, `linear_schedule` and `cosine_schedule` make one, and have the formulas.
    Two schedules with the same numbers are equal.

    Parameters
    ----------
    kind : {"constant", "linear", "cosine"}
    learning_rate : float
        η, at least 0.
    warmup_steps : int
        w, at least 0 and at most T.
    total_steps : int, optional
        T, at least 1; None for a constant.
    final : float
        φ, at least 0; 0 for a constant, which does not reach it.

    Raises
    ------
    TypeError
        A count is not an integer, or a rate is not a number.
    ValueError
        A number is out of range, `kind` is unknown, or `total_steps` is missing, or is given for a
        constant.

    Examples
    --------
    >>> schedule = linear_schedule(1.0, total_steps=4)
    >>> schedule, schedule(1)
    (linear_schedule(1.0, total_steps=4, warmup_steps=0, final=0.0), 0.75)
    >>> Schedule.from_settings(schedule.settings()) == schedule
    True
    """

    kind: Kind
    learning_rate: float
    warmup_steps: int = 0
    total_steps: int | None = None
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {get_args(Kind)}, got {self.kind!r}")
        for name in ("learning_rate", "final"):
            object.__setattr__(self, name, check_number(name, getattr(self, name)))
        warmup = check_count("warmup_steps", self.warmup_steps)
        object.__setattr__(self, "warmup_steps", warmup)
        if self.kind == "constant":
            if self.total_steps is not None or self.final != 0:
                raise ValueError(
                    "a constant schedule must have total_steps = None and final = 0, got "
                    f"{self.total_steps!r} and {self.final}"
                )
            return
        total = check_count("total_steps", self.total_steps, least=1)
        object.__setattr__(self, "total_steps", total)
        if warmup > total:
            raise ValueError(f"warmup_steps must be at most total_steps = {total}, got {warmup}")

    def __call__(self, step: int) -> float:
        """Return η(t) for step t, an int of at least 0."""
        step = check_count("step", step)
        peak, warmup, total = self.learning_rate, self.warmup_steps, self.total_steps
        if step < warmup:
            return peak * (step + 1) / (warmup + 1)
        if total is None:
            return peak
        if step >= total:
            return self.final
        part = (step - warmup) / (total - warmup)
        weight = 1 - part if self.kind == "linear" else (1 + math.cos(math.pi * part)) / 2
        return peak * weight + self.final * (1 - weight)

    def __repr__(self) -> str:
        """Return the call that makes an equal schedule."""
        end = "" if self.total_steps is None else f", final={self.final}"
        total = "" if self.total_steps is None else f"total_steps={self.total_steps}, "
        warmup = f"warmup_steps={self.warmup_steps}"
        return f"{self.kind}_schedule({self.learning_rate}, {total}{warmup}{end})"

    def settings(self) -> dict[str, Any]:
        """Return the parameters by name, as values that JSON has."""
        return asdict(self)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Schedule:
        """Return the schedule whose `settings` these are.

        TypeError or ValueError where they are not settings of a schedule.
        """
        check_names("settings of a schedule", settings, cls.__dataclass_fields__)
        return cls(**settings)


def check_names(name: str, settings: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise ValueError where the names of settings are not all of those that are wanted."""
    check_kind("settings", settings, Mapping)
    if settings.keys() != wanted.keys():
        raise ValueError(f"{name} must have the names {[*wanted]}, got {[*settings]}")


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
    Schedule

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
    return Schedule("constant", learning_rate, warmup_steps)


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
    Schedule

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
    return Schedule("linear", learning_rate, warmup_steps, total_steps, final)


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
    Schedule

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
    return Schedule("cosine", learning_rate, warmup_steps, total_steps, final)
