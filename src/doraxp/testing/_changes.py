"""How the wrong formulas of several deviations combine, and which of them gradients by hand read.

`Changes` maps a quantity of `DenseFormulas` or of an optimizer to its wrong formula. `deviating`
makes a reference of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from doraxp.testing._formulas import Formula

Changes: TypeAlias = Mapping[str, Formula]
HAND_WRITTEN = "the gradients keep the right formulas"
"""A mistake in V, n or m/n, and gradients that are not the derivatives of that forward."""


def original(name: str) -> Formula:
    """Return the formula of the reference for a quantity."""
    return lambda d: getattr(type(d).__mro__[1], name).func(d)  # the class that deviates is first


@dataclass(frozen=True)
class Transformed:
    """A formula that changes a quantity, whatever its formula was. It combines with another one."""

    name: str
    change: Callable[[Any, Any], Any]
    """Takes the reference and the quantity."""

    def __call__(self, d: Any) -> Any:
        return self.change(d, original(self.name)(d))

    def after(self, formula: Formula) -> Formula:
        """Return the formula of the quantity that `formula` computes and this one changes."""
        return lambda d: self.change(d, formula(d))


def transformed(name: str, change: Callable[[Any, Any], Any]) -> Changes:
    """Return the change of one quantity by a function of the reference and the quantity."""
    return {name: Transformed(name, change)}


def multiplied(name: str, factor: Formula) -> Changes:
    """Return the change that multiplies one quantity by a factor."""
    return transformed(name, lambda d, number: number * factor(d))


def added_to(base: Changes, changes: Changes) -> Changes:
    """Return the formulas of `base` and `changes`; one that transforms comes after that of base."""
    found = dict(base)
    for name, formula in changes.items():
        if isinstance(formula, Transformed) and name in base:
            formula = formula.after(base[name])
        found[name] = formula
    return found


def combined(parts: Iterable[Changes]) -> Changes | None:
    """Return the formulas of deviations at once; None if two of them replace the same formula."""
    found: dict[str, Formula] = {}
    for name, formula in (item for part in parts for item in part.items()):
        before = found.get(name, formula)
        if before is formula:
            found[name] = formula
        elif isinstance(formula, Transformed):
            found[name] = formula.after(before)
        elif isinstance(before, Transformed):
            found[name] = before.after(formula)
        else:
            return None
    return found


def hand_written(changes: Changes) -> Changes:
    """Return the part of a deviation that changes x~, W/‖W‖, s B A, n or m/n.

    Gradients that are written by hand read these from the forward, and keep their own formulas. A
    deviation of the gradients alone stays as it is.
    """
    formulas = {name: changes[name] for name in _READ_BY_GRADIENTS & changes.keys()}
    if "s" in changes:
        formulas["update"] = lambda d: changes["s"](d) * (d.b @ d.a)
    if "in_direction_form" in changes:
        formulas["base"] = lambda d: (
            d.w.over(d.w.norms()) if changes["in_direction_form"](d) else d.w
        )
    if "mask" in changes:
        formulas["seen"] = lambda d: d.x if (mask := changes["mask"](d)) is None else mask * d.x
    return formulas or changes


_READ_BY_GRADIENTS = {"update", "unscaled", "length", "eps", "eps_in_root", "gain"}
BY_N: Changes = {"slope": lambda d: d.v.over(d.n), "dlength": lambda d: d.dnorm}
"""The norm's gradient with n in the place of ‖V‖: the same, unless a number is added to n."""
RIGHT_GRADIENTS: tuple[Changes, ...] = (
    {**BY_N, "dnorm": lambda d: -(d.m.over(d.n) * d.dgain).over(d.n)},
    BY_N,
)
"""Two ways to write the gradient through the norm, −(m/n) dg / n and −g dg / n. They differ where g
is not m/n."""
