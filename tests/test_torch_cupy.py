"""`cupy_kernels`: CuPy's kernels for PyTorch's tensors, here on an emulated GPU.

`doraxp bench --backend torch --device cuda` compares their answers on a real one.
"""

from __future__ import annotations

import contextlib

import mixed
import ml_dtypes
import numpy as np
import pytest
from backends import HostCuda
from test_mixed_precision import CONFIGS, named

import doraxp
from doraxp import Adapter
from doraxp.backends import _boundary, exact_products
from doraxp.backends._torch import TorchOperations
from doraxp.testing import expected

UNITS = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}
"""The unit roundoff of a dtype."""


def as_numpy(torch, tensor):
    tensor = tensor.detach()
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def as_tensor(torch, array):
    if array.dtype == ml_dtypes.bfloat16:
        return torch.asarray(array.view(np.int16)).view(torch.bfloat16)
    return torch.asarray(np.asarray(array))


@pytest.fixture
def ran(torch, monkeypatch):
    """Emulate a GPU for all tensors; return the passes that CuPy's kernels computed."""
    import array_api_compat.torch as xp

    from doraxp.torch import _cupy, _function

    host, device, passes = TorchOperations(xp), HostCuda(), []
    monkeypatch.setattr("doraxp.torch._definition._SMALL", 0)
    monkeypatch.setattr(_boundary, "_torch_operations", lambda: host)
    monkeypatch.setattr(_function, "is_chosen", lambda tensor: True)
    monkeypatch.setattr(_cupy, "on_stream", lambda tensor: contextlib.nullcontext())
    monkeypatch.setattr(_cupy, "taken", lambda tensor: device.asarray(as_numpy(torch, tensor)))
    monkeypatch.setattr(_cupy, "given", lambda array: as_tensor(torch, device.numpy(array)))
    for name in ("forward_on_cupy", "backward_on_cupy"):
        run = getattr(_cupy, name)
        monkeypatch.setattr(
            _function, name, lambda *a, _r=run, _n=name, **k: (passes.append(_n), _r(*a, **k))[1]
        )
    with device.active():
        yield passes


def step(torch, case, dtype, *, autocast=False):
    """Return y and the gradients of a layer by the names of `expected`."""
    kind = getattr(torch, dtype)
    arrays = {
        name: torch.tensor(array.astype(np.float32)) for name, array in case.stored(dtype).items()
    }
    for name in ("x", "dy", "bias", "weight"):
        arrays[name] = arrays[name].to(kind)
    if autocast:
        arrays["weight"], arrays["bias"] = arrays["weight"].float(), arrays["bias"].float()
    inputs = {name: arrays[name].requires_grad_() for name in arrays if name != "dy"}
    adapter = Adapter(*(inputs[name] for name in Adapter._fields))
    with torch.autocast("cpu", kind, enabled=autocast):
        y = doraxp.torch.dora_linear(
            inputs["x"], inputs["weight"], adapter, case.config, inputs["bias"]
        )
    names = {"x": "dx", "weight": "dw", "lora_a": "da", "lora_b": "db", "magnitude": "dm",
             "bias": "dbias"}  # fmt: skip
    found = torch.autograd.grad(y, [inputs[name] for name in names], arrays["dy"])
    results = dict(zip(names.values(), found, strict=True)) | {"y": y}
    return {name: array.detach().float().numpy() for name, array in results.items()}


def worst(found, wanted, unit):
    """Return the largest error in units of its bound; dW and dbias are rounded to W's dtype."""
    shares = []
    for name in found:
        want = wanted[name]
        rounded = unit * np.abs(want.value) if name in ("dw", "dbias") else 0
        shares.append(want._replace(bound=want.bound + rounded).share(found[name]))
    return max(shares)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("config", CONFIGS, ids=named)
@pytest.mark.parametrize("stack", [(), (2,)], ids=["one", "stack"])
def test_a_step_by_the_kernels_is_within_the_bounds(torch, ran, config, stack, dtype):
    case = mixed.layer(config, stack=stack)
    found = step(torch, case, dtype)
    precision = "exact" if dtype == "float32" else "mixed"
    assert worst(found, expected(case, dtype, precision=precision), UNITS[dtype]) <= 1
    assert ran == ["forward_on_cupy", "backward_on_cupy"]


@pytest.mark.parametrize("config", CONFIGS[:2], ids=named)
def test_under_autocast_the_products_have_its_dtype(torch, ran, config):
    case = mixed.layer(config)
    found = step(torch, case, "bfloat16", autocast=True)
    assert worst(found, expected(case, "bfloat16", precision="mixed"), 0) <= 1
    with exact_products():
        exact = step(torch, case, "bfloat16", autocast=True)
    assert np.abs(exact["db"] - found["db"]).max() > 0
    assert worst(exact, expected(case, "bfloat16"), 0) <= 1


def test_cupy_kernels_say_why_they_cannot_run(torch):
    from doraxp.torch import cupy_kernels

    why = "cupy_kernels needs CuPy and an NVIDIA GPU; CuPy is"
    with pytest.raises(RuntimeError, match=why), cupy_kernels():
        pass


def test_within_cupy_kernels_tensors_on_a_cpu_are_computed_as_without(torch, monkeypatch):
    from doraxp.torch import _cupy

    monkeypatch.setattr("doraxp.torch._definition._SMALL", 0)
    case = mixed.layer(CONFIGS[0])
    want = step(torch, case, "float32")
    token = _cupy._CHOSEN.set(True)  # as on a machine with a GPU
    try:
        found = step(torch, case, "float32")
    finally:
        _cupy._CHOSEN.reset(token)
    assert all(np.array_equal(found[name], want[name]) for name in want)
