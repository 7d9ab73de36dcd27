"""PyTorch as on a GPU, where no value is read, and in blocks: emulated on the CPU."""

from __future__ import annotations

import mixed
import numpy as np
import pytest
from test_mixed_precision import CONFIGS, is_mixed, named, run, shares

from doraxp import backends
from doraxp.backends import _torch
from doraxp.testing import expected

pytestmark = pytest.mark.lanes("torch")


@pytest.fixture(autouse=True, params=["host", "device"])
def place(request, monkeypatch):
    """Let even small layers be cast in blocks, and a CPU multiply 16-bit numbers as a GPU does."""
    monkeypatch.setattr(_torch, "BLOCK", 64)
    monkeypatch.setattr(_torch, "DEVICE_BLOCK", 128)
    monkeypatch.setattr(_torch, "multiplies", lambda kind, dtype: True)
    if request.param == "device":
        read = "can_read_values"
        monkeypatch.setattr(_torch.TorchOperations, read, lambda self, array: False)
    return request.param


@pytest.fixture(params=CONFIGS, ids=named)
def config(request):
    return request.param


@pytest.mark.dtypes("float16", "bfloat16", "float32", "float64")
@pytest.mark.parametrize("stack", [(), (2,)], ids=["one", "stack"])
def test_all_results_are_within_the_bounds(backend, dtype, config, stack):
    case = mixed.layer(config, stack=stack)
    low = dtype in mixed.KINDS
    wide = () if low else ("x", "weight", "dy", "bias")
    found = run(backend, case, dtype if low else "float32", wide)
    assert is_mixed(found) == low
    precision = "mixed" if low else "exact"
    wanted = expected(case, dtype if low else "float32", precision=precision)
    assert max(shares(found, wanted).values()) <= 1


@pytest.mark.dtypes("float16", "bfloat16")
def test_within_exact_products_only_results_are_rounded(backend, dtype, config):
    case = mixed.layer(config)
    with backends.exact_products():
        found = run(backend, case, dtype)
    assert not is_mixed(found)
    assert max(shares(found, expected(case, dtype)).values()) <= 1


@pytest.mark.dtypes("bfloat16", "float32")
@pytest.mark.parametrize("scale", [2.0**-90, 2.0**70])
def test_rows_whose_squares_leave_the_range_keep_their_norm(backend, dtype, config, scale):
    case = mixed.layer(config)
    weight = case.arrays["weight"].copy()
    weight[3] *= scale
    weight[4] = 0
    b = case.arrays["lora_b"].copy()
    b[3] *= 1 if config.form == "direction" else scale
    b[4] = 0
    case = mixed.changed(case, weight=weight, lora_b=b)
    found = run(backend, case, dtype, () if dtype == "bfloat16" else ("x", "weight", "dy", "bias"))
    assert expected(case, dtype)["norm"].share(found["norm"]) <= 1
    assert found["y"][:, 4].tolist() == pytest.approx([float(found["y"][0, 4])] * 16)
    assert all(np.all(np.isfinite(array)) for array in found.values())
