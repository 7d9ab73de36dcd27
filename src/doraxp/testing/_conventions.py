"""The conventions of an implementation, and its calls: NumPy arrays, passed by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from doraxp._base.scalars import check_flag, check_number
from doraxp._base.types import Dropout, Form, NormGradient
from doraxp.testing._cases import ADAPTER, FULL, HALF, Case, OptimizerCase, compute_dtype_name
from doraxp.testing._catalogue import catalogue
from doraxp.testing._deviations import FORWARD, Changes, eps
from doraxp.testing._libraries import Library, as_numpy, dtype_name
from doraxp.testing._runs import Actual, described

Layout: TypeAlias = Literal["out_in", "in_out"]
NormAxis: TypeAlias = Literal["output", "input"]
Scaling: TypeAlias = Literal["s", "alpha"]
CHOICES = {
    "layout": get_args(Layout),
    "form": get_args(Form),
    "norm_gradient": get_args(NormGradient),
    "norm_axis": get_args(NormAxis),
    "scaling": get_args(Scaling),
    "dropout": (*get_args(Dropout), None),
}
GRADIENTS = {"x": "dx", "lora_a": "da", "lora_b": "db", "magnitude": "dm", "weight": "dw"} | {
    "bias": "dbias"
}


@dataclass(frozen=True, kw_only=True)
class Conventions:
    """The choices that an implementation has made. Any other difference is an error.

    Parameters
    ----------
    layout : {"out_in", "in_out"}
        How it stores the weight. With "in_out", A is (in, rank) and B is (rank, out).
    form : {"weight", "direction"}
    norm_gradient : {"exact", "detached"}
    norm_axis : {"output", "input"}
        Whether there is one norm for each output row or for each input column. With "input",
        only cases with a square weight run.
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

    def cases(self) -> Iterator[Case]:
        """Yield the layers of the catalogue that the implementation accepts, in its form."""
        for case in catalogue():
            *stack, out, inner = case.arrays["weight"].shape
            choices = {case.config.form, case.config.norm_gradient}
            if choices - {"weight", "exact", self.form, self.norm_gradient}:
                continue
            if "dropout_mask" in case.arrays and case.config.dropout != self.dropout:
                continue
            if (not stack or self.stacks) and (self.norm_axis == "output" or out == inner):
                config = replace(case.config, form=self.form, norm_gradient=self.norm_gradient)
                yield replace(case, config=config)


def call_layer(
    function: Callable[..., Any], name: str, conventions: Conventions, case: Case, dtype: str
) -> dict[str, Any]:
    """Call init, forward, gradients or merge; return the results by the names of the quantities."""
    library, wide = Library("numpy"), compute_dtype_name(dtype)
    turned = conventions.layout == "in_out"
    arrays: dict[str, Any] = {}
    for key, values in case.stored(dtype).items():
        array = np.asarray(library.asarray(values, wide if key in ADAPTER else dtype))
        matrix = key in ("weight", "lora_a", "lora_b")
        arrays[key] = np.ascontiguousarray(array.swapaxes(-1, -2)) if turned and matrix else array
    mask = () if conventions.dropout is None else ("dropout_mask",)
    takes = {
        "forward": ("x", "weight", *ADAPTER, "bias", *mask),
        "gradients": ("dy", "x", "weight", *ADAPTER, "bias", *mask),
        "merge": ("weight", *ADAPTER),
        "init": ("weight",),
    }[name]
    s = case.config.scaling if conventions.scaling == "s" else case.config.alpha
    given = {key: arrays.get(key) for key in takes}
    returned, written = _call(function, given, **({} if name == "init" else {"scaling": s}))
    turn_back = {"merged", "dw", "da", "db"} if turned else set()
    if name == "gradients":
        return _gradients(returned, turn_back, has_bias="bias" in arrays) | written
    quantity = {"forward": "y", "merge": "merged", "init": "initial"}[name]
    return {quantity: _actual(returned, quantity in turn_back)} | written


def _gradients(returned: Any, turn_back: Collection[str], *, has_bias: bool) -> dict[str, Any]:
    """Return the gradients by the names of the quantities; a fault takes a gradient's place."""
    if not isinstance(returned, Mapping):
        return {"all": f"must return a dict of gradients, got {type(returned).__name__}"}
    found: dict[str, Any] = {}
    for key, array in returned.items():
        quantity = GRADIENTS.get(key)
        if quantity is None:
            found[str(key)] = f"is not one of {', '.join(GRADIENTS)}"
        elif array is not None:
            without_bias = key == "bias" and not has_bias
            found[quantity] = (
                "must be None where there is no bias"
                if without_bias
                else _actual(array, quantity in turn_back)
            )
    return found or {"all": "returns no gradient"}


def call_step(
    function: Callable[..., Any], _: str, __: Conventions, case: OptimizerCase, dtype: str
) -> dict[str, Any]:
    """Return the parameters after each of the three steps."""
    params, *grads = (
        {key: values.astype(dtype) for key, values in arrays.items()}
        for arrays in (case.params, *case.grads)
    )
    state: Any = None
    found: dict[str, Any] = {}
    for t, gradient in enumerate(grads, start=1):
        returned, written = _call(
            function, {"params": params, "grads": gradient}, state=state, **case.numbers
        )
        found |= written
        if not isinstance(returned, (tuple, list)) or len(returned) != 2:
            kind = type(returned).__name__
            return found | {"all": f"must return (params, state), got {kind}"}
        stepped, state = returned
        if not isinstance(stepped, Mapping) or not set(case.params) <= set(stepped):
            return found | {"all": f"must return params with {', '.join(case.params)}"}
        actual = {key: _actual(stepped[key], False) for key in case.params}
        found |= {f"{key} {t}": got for key, got in actual.items()}
        if any(isinstance(got, str) for got in actual.values()):
            return found
        params = {key: np.array(stepped[key]) for key in case.params}
    return found


def _call(
    function: Callable[..., Any], given: dict[str, Any], **others: Any
) -> tuple[Any, dict[str, str]]:
    """Call a function; return its result, and a fault for each argument that it wrote to."""
    before = {key: _copied(value) for key, value in given.items()}
    returned = function(**given, **others)
    written = {
        key: "was written to" for key, value in given.items() if _bits(before[key]) != _bits(value)
    }
    return returned, written


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: array.copy() for key, array in value.items()}
    return None if value is None else value.copy()


def _bits(value: Any) -> Any:
    """Return the bytes of an array or of a dict of arrays: equal bytes mean equal numbers."""
    if isinstance(value, dict):
        return {key: np.asarray(array).tobytes() for key, array in value.items()}
    return None if value is None else value.tobytes()


def _actual(array: Any, turn: bool) -> Actual | str:
    """Return a result as an array on the host, or the fault that it has."""
    try:
        array = np.array(array)  # a copy: the next call may write to it
    except (Exception, SystemExit) as error:  # any class may have been returned
        return f"cannot be read by numpy.asarray: {described(error)}"
    name = dtype_name(array)
    values = as_numpy(array) if name in (*HALF, "float32", "float64") else array
    return Actual(values.swapaxes(-1, -2) if turn and values.ndim > 1 else values, name, turn)
