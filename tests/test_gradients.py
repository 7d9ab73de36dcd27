"""Every gradient equals central differences, and autograd of the dense formula."""

from __future__ import annotations

import pytest
from slopes import assert_transpose, moved

import doraxp
from doraxp import Adapter, Config

INPUTS = ("x", "lora_a", "lora_b", "magnitude", "weight", "bias")
CHOICES = [
    pytest.param(form, norm_gradient, id=f"{form}-{norm_gradient}")
    for form in ("weight", "direction")
    for norm_gradient in ("exact", "detached")
]


def draw_inputs(draw, *stack):
    return {
        "x": draw(*stack, 5, 6),
        "lora_a": draw(*stack, 3, 6),
        "lora_b": draw(*stack, 7, 3),
        "magnitude": draw(*stack, 7),
        "weight": draw(*stack, 7, 6),
        "bias": draw(*stack, 7),
    }


def forward(inputs, config):
    adapter = Adapter(*(inputs[name] for name in Adapter._fields))
    return doraxp.forward(inputs["x"], inputs["weight"], adapter, config, bias=inputs["bias"])


def all_gradients(dy, cache, train_base=True):
    x, adapter, weight, bias = doraxp.backward(dy, cache, train_base=train_base)
    return {"x": x, **adapter._asdict(), "weight": weight, "bias": bias}


def forward_at_fixed_norm(inputs, base, config):
    """Return y with n as a constant: the detached gradient is the gradient of this function."""
    adapter = Adapter(*(inputs[name] for name in Adapter._fields))
    base_adapter = Adapter(*(base[name] for name in Adapter._fields))
    norm = doraxp.prepare(base["weight"], base_adapter, config).norm
    now = doraxp.prepare(inputs["weight"], adapter, config).norm
    at_fixed_norm = adapter._replace(magnitude=adapter.magnitude * now / norm)
    return doraxp.forward(
        inputs["x"], inputs["weight"], at_fixed_norm, config, bias=inputs["bias"]
    )[0]


@pytest.mark.parametrize("stack", [(), (2,)])
@pytest.mark.parametrize(("form", "norm_gradient"), CHOICES)
def test_each_gradient_is_the_transpose_of_the_derivative(
    backend, draw, form, norm_gradient, stack
):
    """⟨dy, J u⟩ by central differences equals ⟨Jᵀ dy, u⟩ by `backward`, for a random u."""
    config = Config(3, 2.0, form=form, norm_gradient=norm_gradient)
    inputs, directions = draw_inputs(draw, *stack), draw_inputs(draw, *stack)
    dy = draw(*stack, 5, 7)
    _, cache = backend.run(forward, inputs, config)
    gradients = backend.run(all_gradients, dy, cache)
    layers = moved(backend, inputs, directions)
    if norm_gradient == "detached":
        y = forward_at_fixed_norm(layers, inputs, config)
    else:
        y, _ = forward(layers, config)
    assert_transpose(backend, gradients, directions, dy, y)


@pytest.mark.parametrize(("form", "norm_gradient"), CHOICES)
def test_gradients_equal_autograd_of_the_dense_formula(
    backend, draw, assert_close, torch, form, norm_gradient
):
    config = Config(3, 2.0, form=form, norm_gradient=norm_gradient)
    inputs = draw_inputs(draw)
    dy = draw(5, 7)
    y, cache = backend.run(forward, inputs, config)
    actual = backend.run(all_gradients, dy, cache)

    leaves = {
        name: torch.tensor(backend.numpy(array), requires_grad=True)
        for name, array in inputs.items()
    }
    x, a, b, m, weight, bias = leaves.values()
    v = weight if form == "weight" else weight / weight.norm(dim=1, keepdim=True)
    v = v + config.scaling * b @ a
    norm = v.norm(dim=1, keepdim=True)
    if norm_gradient == "detached":
        norm = norm.detach()
    y_dense = x @ (m[:, None] * v / norm).T + bias
    y_dense.backward(torch.tensor(backend.numpy(dy)))

    assert_close(y, y_dense.detach().numpy(), rtol=1e-14)
    for name, leaf in leaves.items():
        assert_close(actual[name], leaf.grad.numpy(), rtol=2e-14)


@pytest.mark.parametrize(("form", "norm_gradient"), CHOICES)
def test_training_the_base_changes_no_other_gradient(
    backend, draw, assert_close, form, norm_gradient
):
    config = Config(3, form=form, norm_gradient=norm_gradient)
    _, cache = backend.run(forward, draw_inputs(draw), config)
    dy = draw(5, 7)
    with_base = backend.run(all_gradients, dy, cache)
    without = backend.run(all_gradients, dy, cache, train_base=False)
    assert without["weight"] is None
    assert without["bias"] is None
    for name in INPUTS[:4]:
        assert_close(without[name], with_base[name], rtol=1e-15)


def test_gradients_of_micro_batches_add_up(backend, draw, assert_close):
    config, inputs, dy = Config(3), draw_inputs(draw), draw(5, 7)
    _, cache = backend.run(forward, inputs, config)
    whole = backend.run(all_gradients, dy, cache)
    parts = []
    for rows in (slice(0, 2), slice(2, 5)):
        _, cache = backend.run(forward, inputs | {"x": inputs["x"][rows, :]}, config)
        parts.append(backend.run(all_gradients, dy[rows, :], cache))
    for name in INPUTS[1:]:
        assert_close(parts[0][name] + parts[1][name], whole[name], rtol=1e-14)
