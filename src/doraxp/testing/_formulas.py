"""The reference: DoRA by the dense formulas, with a name for every intermediate.

    V  = base + s B A        base = W, or W/‖W‖ in the direction form
    n  = ‖V‖ by rows         g  = m / n, 0 where n = 0
    W' = g⊙V                 y  = x W'ᵀ + bias

    dW' = dyᵀ x              dg = rowsum(dW'⊙V)         dm = dg / n
    dn  = −g dg / n          dV = g⊙dW' + dn ∂n/∂V      ∂n/∂V = V / n, dropped where detached
    dA  = s Bᵀ dV            dB = s dV Aᵀ               dx = dy W'        dbias = Σ_tokens dy

With a dropout mask M, x~ = M⊙x is multiplied by W', and the rest x − x~ by another weight K. It is
W, or g⊙base where the mask multiplies the low-rank product alone.

    y   = x~ W'ᵀ + (x Kᵀ − x~ Kᵀ) + bias        dx = M⊙(dy W') + (dy K − M⊙(dy K))
    dW' = dyᵀ x~        dK = dyᵀ x − dyᵀ x~

The package computes the same numbers by other formulas, from W, A and B. A deviation replaces the
formulas of some names, and every name that depends on them changes with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, TypeAlias

from doraxp._base.types import Config

Formula: TypeAlias = Callable[[Any], Any]
Arrays: TypeAlias = dict[str, Any]
OUTPUTS = ("norm", "merged", "y")
GRADIENTS = ("dx", "da", "db", "dm", "dw", "dbias")
QUANTITIES = (*OUTPUTS, *GRADIENTS)
RETURNED = (*QUANTITIES, "initial")  # an implementation also returns m at init


class DenseFormulas:
    """One layer in `Rounded` or `Plain` numbers; x and dy have one axis of tokens."""

    def __init__(self, config: Config, arrays: Mapping[str, Any], number: Formula) -> None:
        self.config = config
        self.rank = config.rank
        self.inputs = {name: number(array) for name, array in arrays.items()}
        w = arrays["weight"]
        self.inner = w.shape[-1]
        self.w, self.a, self.b = (self.inputs[name] for name in ("weight", "lora_a", "lora_b"))
        self.m = self.inputs["magnitude"].reshape(*w.shape[:-1], 1)
        tokens: dict[str, Any] = {
            name: self.inputs[name].reshape(*w.shape[:-2], -1, w.shape[-2 if name == "dy" else -1])
            for name in ("x", "dy", "dropout_mask")
            if name in arrays
        }
        self.x, self.dy, self.given_mask = tokens["x"], tokens["dy"], tokens.get("dropout_mask")

    @cached_property
    def s(self) -> float:
        return self.config.scaling

    @cached_property
    def in_direction_form(self) -> bool:
        return self.config.form == "direction"

    @cached_property
    def low_rank_dropout(self) -> bool:
        return self.config.dropout == "low_rank"

    @cached_property
    def mask(self) -> Any:
        return self.given_mask

    @cached_property
    def bias(self) -> Any:
        return self.inputs["bias"][..., None, :] if "bias" in self.inputs else 0.0

    @cached_property
    def initial(self) -> Any:
        """The magnitude of a fresh adapter, where B A is 0."""
        return self.w.norms()[..., 0]

    # Forward

    @cached_property
    def base(self) -> Any:
        return self.w.over(self.w.norms()) if self.in_direction_form else self.w

    @cached_property
    def update(self) -> Any:
        return self.s * (self.b @ self.a)

    @cached_property
    def v(self) -> Any:
        return self.base + self.update

    @cached_property
    def length(self) -> Any:
        return self.v.norms()

    @cached_property
    def eps(self) -> float:
        """The number that some implementations add to the norm."""
        return 0.0

    @cached_property
    def eps_in_root(self) -> float:
        """The number that some implementations add to the square whose root is the norm."""
        return 0.0

    @cached_property
    def root(self) -> Any:
        if not self.eps_in_root:
            return self.length
        return (self.length * self.length + self.eps_in_root).sqrt()

    @cached_property
    def n(self) -> Any:
        return self.root + self.eps if self.eps else self.root

    @cached_property
    def gain(self) -> Any:
        return self.m.over(self.n)

    @cached_property
    def merged(self) -> Any:
        return self.gain * self.v

    @cached_property
    def acting(self) -> Any:
        """The weight that multiplies x~, as rows of (out, in)."""
        return self.merged

    @cached_property
    def seen(self) -> Any:
        return self.x if self.mask is None else self.mask * self.x

    @cached_property
    def beside(self) -> Any:
        return self.gain * self.base if self.low_rank_dropout else self.w

    @cached_property
    def product(self) -> Any:
        """x~ W'ᵀ + (x − x~) Kᵀ."""
        product = self.seen @ self.acting.mT
        if self.mask is None:
            return product
        return product + (self.x @ self.beside.mT - self.seen @ self.beside.mT)

    @cached_property
    def y(self) -> Any:
        return self.product + self.bias

    @cached_property
    def norm(self) -> Any:
        return self.n[..., 0]

    # Backward

    @cached_property
    def dmerged(self) -> Any:
        return self.dy.mT @ self.seen

    @cached_property
    def dbeside(self) -> Any:
        return 0.0 if self.mask is None else self.dy.mT @ self.x - self.dy.mT @ self.seen

    @cached_property
    def through_gain(self) -> Any:
        """The terms whose sum over a row is dg."""
        terms = self.dmerged * self.v
        if self.mask is None or not self.low_rank_dropout:
            return terms
        return terms + self.dbeside * self.base

    @cached_property
    def dgain(self) -> Any:
        return self.through_gain.sum(-1, keepdims=True)

    @cached_property
    def dnorm(self) -> Any:
        return -((self.gain * self.dgain).over(self.n))

    @cached_property
    def dlength(self) -> Any:
        return self.dnorm * self.length.over(self.root) if self.eps_in_root else self.dnorm

    @cached_property
    def slope(self) -> Any:
        return self.v.over(self.length)

    @cached_property
    def through_norm(self) -> Any:
        exact = self.config.norm_gradient == "exact"
        return self.dlength * self.slope if exact else 0.0

    @cached_property
    def dv(self) -> Any:
        return self.gain * self.dmerged + self.through_norm

    @cached_property
    def back(self) -> Any:
        """The weight that multiplies dy in the gradient of x~."""
        return self.acting

    @cached_property
    def back_gain(self) -> Any:
        return self.gain

    @cached_property
    def back_rows(self) -> Any:
        return self.v

    @cached_property
    def dx(self) -> Any:
        dx = self.dy @ self.back
        if self.mask is None:
            return dx
        rest = self.dy @ self.beside
        return self.mask * dx + (rest - self.mask * rest)

    @cached_property
    def da(self) -> Any:
        return self.s * (self.b.mT @ self.dv)

    @cached_property
    def db(self) -> Any:
        return self.s * (self.dv @ self.a.mT)

    @cached_property
    def dm(self) -> Any:
        return self.dgain.over(self.n)[..., 0]

    @cached_property
    def dbase(self) -> Any:
        if self.mask is None or not self.low_rank_dropout:
            return self.dv
        return self.dv + self.gain * self.dbeside

    @cached_property
    def through_base(self) -> Any:
        if not self.in_direction_form:
            return self.dbase
        along = (self.base * self.dbase).sum(-1, keepdims=True)
        return (self.dbase - self.base * along).over(self.w.norms())

    @cached_property
    def dw(self) -> Any:
        if self.mask is None or self.low_rank_dropout:
            return self.through_base
        return self.through_base + self.dbeside

    @cached_property
    def dbias(self) -> Any:
        return self.dy.sum(-2)


def deviating(reference: type, changes: Mapping[str, Formula]) -> type:
    """Return a reference in which some names have other formulas."""
    return type(
        "Deviating",
        (reference,),
        {name: cached_property(formula) for name, formula in changes.items()},
    )
