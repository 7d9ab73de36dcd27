"""The conventions of an implementation: the choices that it has made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

from doraxp._base.scalars import check_flag, check_number
from doraxp._base.types import Dropout, Form, NormGradient
from doraxp.testing._cases import FULL, HALF, Case, OptimizerCase
from doraxp.testing._changes import Changes
from doraxp.testing._deviations import FORWARD, eps
from doraxp.testing._operator_cases import OperatorCase
from doraxp.testing._sum_cases import SumCase
from doraxp.testing._update_cases import UpdateCase

Layout: TypeAlias = Literal["out_in", "in_out", "weight_in_out"]
NormAxis: TypeAlias = Literal["output", "input"]
Scaling: TypeAlias = Literal["s", "alpha"]
AnyCase: TypeAlias = Case | OperatorCase | UpdateCase | SumCase | OptimizerCase
TURNED: dict[Layout, tuple[str, ...]] = {
    "out_in": (),
    "in_out": ("weight", "lora_a", "lora_b"),
    "weight_in_out": ("weight",),
}
"""The matrices of a layer that are given with their last two axes the other way round."""
CHOICES = {
    "layout": get_args(Layout),
    "form": get_args(Form),
    "norm_gradient": get_args(NormGradient),
    "norm_axis": get_args(NormAxis),
    "scaling": get_args(Scaling),
    "dropout": (*get_args(Dropout), None),
}


@dataclass(frozen=True, kw_only=True)
class Conventions:
    """The choices that an implementation has made. Any other difference is an error.

    Parameters
    ----------
    layout : {"out_in", "in_out", "weight_in_out"}
        How it stores the matrices of a layer. Convolutions, embeddings, other updates and the
        parameters of an optimizer are always given as the catalogue has them::

            "out_in"           weight (out, in)   A (rank, in)   B (out, rank)
            "in_out"           weight (in, out)   A (in, rank)   B (rank, out)
            "weight_in_out"    weight (in, out)   A (rank, in)   B (out, rank)

    form : {"weight", "direction"}
    norm_gradient : {"exact", "detached"}
    norm_axis : {"output", "input"}
        Whether there is one norm for each output row or for each input column. With "input",
        only cases with a square weight run, and neither convolutions nor embeddings.
    bias_scaled : bool
        Whether the bias is multiplied by m/n.
    eps : float
        A number that is added to the norm.
    scaling : {"s", "alpha"}
        The number that its argument `scaling` expects.
    dropout : {"input", "low_rank"}, optional
        The x that the dropout mask multiplies, as in `doraxp.Config`; None if its functions do
        not take a mask.
    stacks : bool
        Whether it accepts weights with leading axes.
    dtypes : tuple of str
        The storage dtypes to run in.

    Raises
    ------
    TypeError
        `bias_scaled` or `stacks` is not a bool, or `eps` is not a number.
    ValueError
        An argument is not one of the choices above, or `eps` is negative or not finite.
    """

    layout: Layout = "out_in"
    form: Form = "weight"
    norm_gradient: NormGradient = "exact"
    norm_axis: NormAxis = "output"
    bias_scaled: bool = False
    eps: float = 0.0
    scaling: Scaling = "s"
    dropout: Dropout | None = None
    stacks: bool = False
    dtypes: tuple[str, ...] = ("float32", "float64")

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {value!r}")
        check_flag("bias_scaled", self.bias_scaled)
        check_flag("stacks", self.stacks)
        object.__setattr__(self, "eps", check_number("eps", self.eps))
        known = (*HALF, *FULL)
        # A string is also a collection: of letters.
        if isinstance(self.dtypes, str) or not self.dtypes or not set(self.dtypes) <= set(known):
            raise ValueError(f"dtypes must be some of {known}, got {self.dtypes!r}")

    @property
    def changes(self) -> Changes:
        """The formulas that take the place of the reference's under these conventions."""
        axis = FORWARD["the norm runs over the input axis"] if self.norm_axis == "input" else {}
        bias = FORWARD["the bias is scaled by m/n, so that forward is not merge"]
        return {**axis, **(bias if self.bias_scaled else {}), **(eps(self.eps) if self.eps else {})}

    def accepted(self, cases: Iterable[AnyCase]) -> Iterator[AnyCase]:
        """Yield the cases that the implementation accepts, those of layers in its form."""
        for case in cases:
            if set(self.lacks(case)) <= {"dtypes"}:
                if isinstance(case, (OptimizerCase, SumCase)):
                    yield case
                else:
                    config = replace(case.config, form=self.form, norm_gradient=self.norm_gradient)
                    yield replace(case, config=config)

    def lacks(self, case: AnyCase) -> dict[str, Any]:
        """Return the choices, by name, that a case is for and that were declared otherwise.

        Of several dtypes one is enough. A case that has all that it needs returns an empty dict.
        """
        needs: dict[str, Any] = {}
        if isinstance(case, SumCase):
            needs = {"norm_axis": "output", "form": "weight"}
        elif not isinstance(case, OptimizerCase):
            *stack, out, inner = case.arrays["weight"].shape
            if isinstance(case, OperatorCase) or out != inner:
                needs["norm_axis"] = "output"
            if stack and not isinstance(case, OperatorCase):
                needs["stacks"] = True
            if case.config.form != "weight":
                needs["form"] = case.config.form
            if case.config.norm_gradient != "exact":
                needs["norm_gradient"] = case.config.norm_gradient
            if "dropout_mask" in case.arrays:
                needs["dropout"] = case.config.dropout
            if "magnitude" not in case.arrays:
                needs["form"] = "weight"
        lacks = {name: value for name, value in needs.items() if getattr(self, name) != value}
        return lacks if set(case.dtypes) & set(self.dtypes) else {**lacks, "dtypes": case.dtypes}
