"""`reduced_precision`: the errors that it may cause, and that it ends with its block."""

from __future__ import annotations

import numpy as np
import pytest

import doraxp
from doraxp import Adapter, Config
from doraxp.backends import reduced_precision

EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-10}  # TF32 has 10 bits


@pytest.mark.dtypes("float16", "bfloat16", "float32")
@pytest.mark.parametrize("form", ["weight", "direction"])
@pytest.mark.parametrize("cancels", [False, True])
def test_errors_are_as_small_as_if_each_factor_were_rounded_once(
    backend, draw, assert_close, dtype, form, cancels
):
    # For a row that cancels, the exact dB is a small difference with a large relative error.
    config = Config(3, form=form, norm_gradient="detached" if cancels else "exact")
    weight, x, dy = (draw(*shape, dtype=dtype) for shape in ((7, 6), (5, 6), (5, 7)))
    adapter = Adapter(*(draw(*shape, dtype="float32") for shape in ((3, 6), (7, 3), (7,))))
    if cancels:  # one row of V is a few hundredths of its terms
        a, values = (backend.numpy(array).astype("float64") for array in (adapter.lora_a, weight))
        b = backend.numpy(adapter.lora_b).copy()
        row = b[2].astype("float64") @ a
        values[2] = -0.97 * row
        if form == "direction":
            b[2] /= np.linalg.norm(values[2])
        weight = backend.asarray(values.astype(backend.numpy(weight).dtype))
        m = backend.numpy(adapter.magnitude).copy()
        m[2] = 0.03  # as after training: its gain is about 1
        adapter = adapter._replace(lora_b=backend.asarray(b), magnitude=backend.asarray(m))

    def step(x, weight, adapter, dy):
        y, cache = doraxp.forward(x, weight, adapter, config, bias=adapter.magnitude)
        gradients = doraxp.backward(dy, cache, train_base=True)
        return y, gradients.x, *gradients.adapter, gradients.weight, gradients.bias

    expected = backend.run(step, x, weight, adapter, dy)
    with reduced_precision():
        actual = backend.run(step, x, weight, adapter, dy)
    again = backend.run(step, x, weight, adapter, dy)
    for one, other, third in zip(actual, expected, again, strict=True):
        assert_close(one, other, rtol=4 * EPS[dtype])
        assert_close(third, other, rtol=0)
