"""Parity with PEFT 0.21.2 itself: forward, detached gradients, merge; and where it differs."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

import doraxp
from doraxp import Adapter, Config
from doraxp.bench import DTYPES, TASKS, Workload, check_all, contestants

RTOL = {"float32": 1e-5, "float64": 1e-12}


def peft_layer(peft, torch, weight, adapter, config, bias=None):
    """A PEFT linear layer with DoRA that holds the given arrays."""
    out, inner = weight.shape
    base = torch.nn.Sequential(torch.nn.Linear(inner, out, bias=bias is not None))
    base[0].weight.data = torch.tensor(weight)
    if bias is not None:
        base[0].bias.data = torch.tensor(bias)
    lora = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.scaling * config.rank,
        target_modules=["0"],
        use_dora=True,
        lora_dropout=0.0,
    )
    model = peft.get_peft_model(base, lora, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight.data = torch.tensor(adapter.lora_a)
    layer.lora_B["default"].weight.data = torch.tensor(adapter.lora_b)
    layer.lora_magnitude_vector["default"].weight.data = torch.tensor(adapter.magnitude)
    return layer


@pytest.fixture(params=["float32", "float64"])
def case(request):
    dtype = request.param
    rng = np.random.default_rng(17)

    def draw(*shape):
        return rng.standard_normal(shape).astype(dtype)

    weight, bias = draw(24, 16), draw(24)
    adapter = Adapter(draw(4, 16), draw(24, 4), draw(24))
    return dtype, weight, bias, adapter, draw(9, 16), draw(9, 24)


def assert_close(actual, desired, rtol):
    atol = rtol * float(np.max(np.abs(desired)))
    np.testing.assert_allclose(actual, desired, rtol=0, atol=atol)


def assert_equal_to_pefts(y, grads, layer, y_peft, x_torch, rtol):
    """Compare y, dx and the adapter's gradients with those of PEFT's layer."""
    assert_close(y, y_peft.detach().numpy(), rtol)
    assert_close(grads.x, x_torch.grad.numpy(), rtol)
    expected = (
        layer.lora_A["default"].weight.grad,
        layer.lora_B["default"].weight.grad,
        layer.lora_magnitude_vector["default"].weight.grad,
    )
    for leaf, gradient in zip(grads.adapter, expected, strict=True):
        assert_close(leaf, gradient.numpy(), rtol)


def test_forward_and_detached_gradients_equal_pefts(peft, torch, case):
    dtype, weight, bias, adapter, x, dy = case
    config = Config(4, 8.0, norm_gradient="detached")
    layer = peft_layer(peft, torch, weight, adapter, config, bias)
    x_torch = torch.tensor(x, requires_grad=True)
    y_peft = layer(x_torch)
    y_peft.backward(torch.tensor(dy))

    y, cache = doraxp.forward(x, weight, adapter, config, bias=bias)
    grads = doraxp.backward(dy, cache)
    assert_equal_to_pefts(y, grads, layer, y_peft, x_torch, RTOL[dtype])


@pytest.mark.parametrize("with_bias", [True, False])
def test_dropout_of_the_input_equals_pefts_with_the_same_mask(peft, torch, case, with_bias):
    dtype, weight, bias, adapter, x, dy = case
    bias = bias if with_bias else None
    config = Config(4, 8.0, norm_gradient="detached", dropout="input")
    mask = ((np.random.default_rng(3).uniform(size=x.shape) > 0.25) / 0.75).astype(dtype)

    layer = peft_layer(peft, torch, weight, adapter, config, bias)
    peers = importlib.import_module("peers.layers")  # needs PyTorch
    peers.Peft().drop(layer, peers.Given(torch.tensor(mask)))
    x_torch = torch.tensor(x, requires_grad=True)
    y_peft = layer(x_torch)
    y_peft.backward(torch.tensor(dy))

    y, cache = doraxp.forward(x, weight, adapter, config, bias=bias, dropout_mask=mask)
    grads = doraxp.backward(dy, cache)
    assert_equal_to_pefts(y, grads, layer, y_peft, x_torch, RTOL[dtype])


def test_merge_equals_pefts(peft, torch, case):
    dtype, weight, bias, adapter, _, _ = case
    config = Config(4, 8.0)
    layer = peft_layer(peft, torch, weight, adapter, config, bias)
    layer.merge()
    merged = layer.base_layer.weight.detach().numpy()
    assert_close(doraxp.merge(weight, adapter, config), merged, RTOL[dtype])


def test_init_gives_pefts_magnitude(peft, torch, case):
    dtype, weight, _, _, _, _ = case
    base = torch.nn.Sequential(torch.nn.Linear(16, 24, bias=False))
    base[0].weight.data = torch.tensor(weight)
    lora = peft.LoraConfig(r=4, target_modules=["0"], use_dora=True)
    model = peft.get_peft_model(base, lora, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    magnitude = layer.lora_magnitude_vector["default"].weight.detach().numpy()
    assert_close(doraxp.init(weight, Config(4), seed=0).magnitude, magnitude, RTOL[dtype])
    limit = float(np.max(np.abs(layer.lora_A["default"].weight.detach().numpy())))
    assert limit <= 1 / np.sqrt(16)  # the same bounds as "kaiming"


def test_a_zero_row_is_nan_in_peft_and_safe_here(peft, torch, case):
    _, weight, bias, _, x, _ = case
    config, weight = Config(4), weight.copy()
    weight[5] = 0
    adapter = doraxp.init(weight, config, seed=0)
    y, _ = doraxp.forward(x, weight, adapter, config, bias=bias)
    y_peft = peft_layer(peft, torch, weight, adapter, config, bias)(torch.tensor(x))
    assert np.isnan(y_peft.detach().numpy()[:, 5]).all()
    np.testing.assert_array_equal(y[:, 5], np.full(9, bias[5]))


def test_a_bf16_base_is_off_at_init_in_peft_and_exact_here(peft, torch):
    rng = np.random.default_rng(17)
    weight = torch.tensor(rng.standard_normal((64, 256)), dtype=torch.bfloat16)
    base = torch.nn.Sequential(torch.nn.Linear(256, 64, bias=False, dtype=torch.bfloat16))
    base[0].weight.data = weight
    lora = peft.LoraConfig(r=4, target_modules=["0"], use_dora=True)
    layer = peft.get_peft_model(base, lora).base_model.model[0]
    x = torch.tensor(rng.standard_normal((5, 256)), dtype=torch.bfloat16)
    y_base = layer.base_layer(x).detach()
    drift = (layer(x).detach().float() / y_base.float() - 1).abs().max()
    assert drift > 2**-9  # more than the rounding of y itself
    config = Config(4)
    adapter = doraxp.init(weight, config, seed=0)
    prepared = doraxp.prepare(weight, adapter, config)
    assert torch.equal(prepared.gain, torch.ones(64))
    assert torch.equal(doraxp.merge(weight, adapter, config), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("task", TASKS)
def test_the_benchmarks_contestants_are_right_on_every_call(peft, torch, task, dtype):
    workload = Workload(48, 32, 9, 4, dtype)
    present = contestants(task, workload, ("torch", "PEFT"))
    assert {contestant.library for contestant in present} == {"torch", "PEFT"}
    check_all(task, workload, present)
    if task != "adamw":  # torch.optim's state moves on
        check_all(task, workload, present)
