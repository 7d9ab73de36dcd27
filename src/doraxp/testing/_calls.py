"""The calls of an implementation: NumPy arrays, passed by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from doraxp._base.types import Config
from doraxp._base.words import counted
from doraxp.testing._cases import ADAPTER, HALF, Case, OptimizerCase, compute_dtype_name
from doraxp.testing._conventions import TURNED, Conventions
from doraxp.testing._libraries import Library, as_numpy, dtype_name
from doraxp.testing._operator_cases import OperatorCase
from doraxp.testing._runs import Actual, described
from doraxp.testing._sum_cases import SumCase
from doraxp.testing._update_cases import FACTORS, UpdateCase

GRADIENTS = {"x": "dx", "lora_a": "da", "lora_b": "db", "magnitude": "dm", "weight": "dw"} | {
    "bias": "dbias"
}
QUANTITY = {"forward": "y", "merge": "merged", "init": "initial"}


def call_layer(
    function: Callable[..., Any], name: str, conventions: Conventions, case: Case, dtype: str
) -> dict[str, Any]:
    """Call init, forward, gradients or merge; return the results by the names of the quantities."""
    library, wide = Library("numpy"), compute_dtype_name(dtype)
    turned = TURNED[conventions.layout]
    arrays: dict[str, Any] = {}
    for key, values in case.stored(dtype).items():
        array = np.asarray(library.asarray(values, wide if key in ADAPTER else dtype))
        arrays[key] = np.ascontiguousarray(array.swapaxes(-1, -2)) if key in turned else array
    mask = () if conventions.dropout is None else ("dropout_mask",)
    takes = {
        "forward": ("x", "weight", *ADAPTER, "bias", *mask),
        "gradients": ("dy", "x", "weight", *ADAPTER, "bias", *mask),
        "merge": ("weight", *ADAPTER),
        "init": ("weight",),
    }[name]
    given = {key: arrays.get(key) for key in takes}
    numbers = {} if name == "init" else {"scaling": _scaling(case.config, conventions)}
    returned, written = _call(function, given, **numbers)
    turn_back = {GRADIENTS[key] for key in turned} | ({"merged"} if "weight" in turned else set())
    return _read(name, returned, GRADIENTS, turn_back, has_bias="bias" in arrays) | written


def call_operator(
    function: Callable[..., Any],
    name: str,
    conventions: Conventions,
    case: OperatorCase,
    dtype: str,
) -> dict[str, Any]:
    """Call init, forward, gradients or merge of a convolution or an embedding."""
    arrays, numbers = case.stored(dtype), dict(case.numbers)
    is_embedding = case.kind == "embedding"
    mask = () if conventions.dropout is None else ("dropout_mask",)
    others: tuple[str, ...] = () if is_embedding else ("bias", *mask)
    takes = {
        "forward": ("x", "weight", *ADAPTER, *others),
        "gradients": ("dy", "x", "weight", *ADAPTER, *others),
        "merge": ("weight", *ADAPTER),
        "init": ("weight",),
    }[name]
    if name in ("merge", "init"):  # the weight alone
        numbers = {key: number for key, number in numbers.items() if key == "groups"}
    numbers = {key: tuple(n) if isinstance(n, list) else n for key, n in numbers.items()}
    if name != "init":
        numbers["scaling"] = _scaling(case.config, conventions)
    returned, written = _call(function, {key: arrays.get(key) for key in takes}, **numbers)
    absent = {"x", "bias"} if is_embedding else set()
    names = {key: quantity for key, quantity in GRADIENTS.items() if key not in absent}
    return _read(name, returned, names, has_bias="bias" in arrays) | written


def call_update(
    function: Callable[..., Any], _: str, conventions: Conventions, case: UpdateCase, dtype: str
) -> dict[str, Any]:
    """Call the merge of an update of another kind."""
    arrays = case.stored(dtype)
    given = {key: arrays.get(key) for key in ("weight", *FACTORS[case.kind], "magnitude")}
    returned, written = _call(function, given, scaling=_scaling(case.config, conventions))
    return _read("merge", returned) | written


def call_sum(
    function: Callable[..., Any], _: str, conventions: Conventions, case: SumCase, dtype: str
) -> dict[str, Any]:
    """Call the merge of several adapters."""
    given = {"weight": case.stored(dtype)["weight"], "adapters": case.adapters(dtype)}
    scalings = [_scaling(config, conventions) for config in case.configs]
    strengths = list(case.strengths)
    returned, written = _call(function, given, strengths=strengths, scalings=scalings)
    return _read("merge", returned) | written


def _scaling(config: Config, conventions: Conventions) -> float:
    """Return the number that the implementation expects as `scaling`."""
    if conventions.scaling == "s" or config.alpha is None:
        return config.scaling
    return config.alpha


def _read(
    name: str,
    returned: Any,
    gradients: Mapping[str, str] = GRADIENTS,
    turn_back: Collection[str] = (),
    *,
    has_bias: bool = False,
) -> dict[str, Any]:
    """Return results by the names of the quantities; a fault takes the place of a result."""
    if name == "gradients":
        return _gradients(returned, gradients, turn_back, has_bias=has_bias)
    quantity = QUANTITY[name]
    return {quantity: _actual(returned, quantity in turn_back)}


def _gradients(
    returned: Any, names: Mapping[str, str], turn_back: Collection[str], *, has_bias: bool
) -> dict[str, Any]:
    """Return the gradients by the names of the quantities; a fault takes a gradient's place."""
    if not isinstance(returned, Mapping):
        return {"all": f"must return a dict of gradients, got {_named(returned)}"}
    found: dict[str, Any] = {}
    for key, array in returned.items():
        quantity = names.get(key)
        if quantity is None:
            found[str(key)] = f"is not one of {', '.join(names)}"
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
            got = _named(returned)
            if isinstance(returned, (tuple, list)):
                got += f" of {counted(len(returned), 'item')}"
            return found | {"all": f"must return (params, state), got {got}"}
        stepped, state = returned
        if not isinstance(stepped, Mapping) or not set(case.params) <= set(stepped):
            got = _named(stepped)
            if isinstance(stepped, Mapping):
                got += f" with {', '.join(map(str, stepped)) or 'no keys'}"
            return found | {"all": f"must return params with {', '.join(case.params)}, got {got}"}
        actual = {key: _actual(stepped[key], False) for key in case.params}
        found |= {f"{key} {t}": got for key, got in actual.items()}
        if any(isinstance(got, str) for got in actual.values()):
            return found
        params = {key: np.asarray(stepped[key]).copy() for key in case.params}
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
        return {key: _copied(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_copied(each) for each in value]
    return None if value is None else value.copy()


def _bits(value: Any) -> Any:
    """Return the bytes of arrays in their containers: equal bytes mean equal numbers."""
    if isinstance(value, dict):
        return {key: _bits(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_bits(each) for each in value]
    return None if value is None else np.asarray(value).tobytes()


def _actual(array: Any, turn: bool) -> Actual | str:
    """Return a result as an array on the host, or the fault that it has."""
    try:
        read = np.asarray(array).copy()  # the next call may write to it
    except (Exception, SystemExit) as error:  # any class may have been returned
        rule = "must be an array that numpy.asarray can read"
        return f"{rule}, got {_named(array)}: {described(error)}"
    if read.ndim == 0 and read.dtype.kind in "OUS":  # an object, a text or bytes
        return f"must be an array of numbers, got {_named(read.item())}"
    name = dtype_name(read)
    values = as_numpy(read) if name in (*HALF, "float32", "float64") else read
    return Actual(values.swapaxes(-1, -2) if turn and values.ndim > 1 else values, name, turn)


def _named(value: Any) -> str:
    """Return the name of a value's type, or "None"."""
    return "None" if value is None else type(value).__name__
