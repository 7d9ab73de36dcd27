"""Run one case of the catalogue on one array library, and read the results back."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np

import doraxp
from doraxp._base.types import Adapter
from doraxp._base.words import counted
from doraxp.testing._cases import ADAPTER, Case, OptimizerCase, compute_dtype_name
from doraxp.testing._libraries import Library, as_numpy, dtype_name
from doraxp.testing._reference import Expected


class Actual(NamedTuple):
    """A result, read back to the host."""

    values: Any
    dtype: str
    turned: bool = False
    """Whether the array that was returned has its last two axes the other way round."""

    def mismatch(self, want: Expected) -> str | None:
        """Return the fault in shape, dtype or finiteness, in words; None without a fault."""
        if self.values.shape != want.value.shape:
            got, must = (
                (*shape[:-2], *shape[-2:][:: -1 if self.turned else 1])
                for shape in (self.values.shape, want.value.shape)
            )
            return f"has shape {got}, must have {must}"
        if self.dtype != want.dtype:
            return f"has dtype {self.dtype}, must have {want.dtype}"
        if bad := np.count_nonzero(~np.isfinite(self.values)):
            verb = "is" if bad == 1 else "are"
            return f"has {counted(int(bad), 'number')} that {verb} not finite"
        return None


def run_case(case: Case | OptimizerCase, dtype: str, library: Library) -> Any:
    """Return the quantities of a case as `Actual`, or the exception that was raised."""
    # NumPy need not warn of an overflow: infinities and NaN in the results are reported.
    with library.active(), np.errstate(all="ignore"):
        try:
            run = _run_layer if isinstance(case, Case) else _run_steps
            found: Any = run(case, dtype, library)
            return {
                name: Actual(as_numpy(array), dtype_name(array))
                for name, array in found.items()
                if array is not None
            }
        except Exception as error:  # of any type: it is reported with the name of the case
            return error


def _run_layer(case: Any, dtype: str, library: Library) -> dict[str, Any]:
    wide = compute_dtype_name(dtype)
    arrays = {
        name: library.asarray(array, wide if name in ADAPTER else dtype)
        for name, array in case.stored(dtype).items()
    }
    adapter = Adapter(*(arrays[name] for name in ADAPTER))
    weight, bias = arrays["weight"], arrays.get("bias")
    prepared = doraxp.prepare(weight, adapter, case.config)
    y, cache = doraxp.forward(
        arrays["x"],
        weight,
        adapter,
        case.config,
        bias=bias,
        prepared=prepared,
        dropout_mask=arrays.get("dropout_mask"),
    )
    grads = doraxp.backward(arrays["dy"], cache, train_base=True)
    return {
        "norm": prepared.norm,
        "merged": doraxp.merge(weight, adapter, case.config, prepared=prepared),
        "y": y,
        "dx": grads.x,
        "da": grads.adapter.lora_a,
        "db": grads.adapter.lora_b,
        "dm": grads.adapter.magnitude,
        "dw": grads.weight,
        "dbias": grads.bias,
    }


def _run_steps(case: Any, dtype: str, library: Library) -> dict[str, Any]:
    init, step, numbers = _optimizer(case)
    params, *grads = (
        Adapter(*(library.asarray(arrays[name], dtype) for name in ADAPTER))
        for arrays in (case.params, *case.grads)
    )
    state = init(params)
    found: dict[str, Any] = {}
    for t, gradient in enumerate(grads, start=1):
        params, state = step(params, gradient, state, **numbers)
        found |= {f"{name} {t}": leaf for name, leaf in params._asdict().items()}
    return found


def _optimizer(case: OptimizerCase) -> tuple[Any, Any, dict[str, Any]]:
    """Return the functions that make the state and a step, and the arguments of the step."""
    numbers = dict(case.numbers)
    if case.optimizer == "sgd":
        return doraxp.sgd_init, doraxp.sgd_step, numbers
    if case.optimizer == "loraplus":
        return doraxp.adamw_init, doraxp.adamw_step, {"lora_plus": numbers.pop("ratio"), **numbers}
    if case.optimizer == "scaled_adamw":
        return doraxp.adamw_init, partial(_scaled_step, damping=numbers.pop("damping")), numbers
    return doraxp.adamw_init, doraxp.adamw_step, numbers


def _scaled_step(params: Any, grads: Any, state: Any, *, damping: float, **numbers: Any) -> Any:
    scaled = doraxp.scaled_gradients(params, grads, damping=damping)
    return doraxp.adamw_step(params, scaled, state, **numbers)


def described(error: BaseException) -> str:
    """Return the type and the message of an exception that other code raised."""
    try:
        message = str(error)
    except Exception as another:
        message = f"its message raises {type(another).__name__}"
    return f"{type(error).__name__}: {message}"
