"""Fine-tune an Equinox network with DoRA: `doraxp.jax.dora_linear` in a module, optax, merge.

    python examples/equinox_mlp.py

A network learns sin(3x), is frozen, and is adapted to sin(3x + 1).
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import doraxp
import doraxp.jax


class DoRALinear(eqx.Module):
    """A frozen `eqx.nn.Linear` with an adapter."""

    linear: eqx.nn.Linear
    adapter: doraxp.Adapter
    config: doraxp.Config = eqx.field(static=True)

    def __call__(self, x, *, key=None):
        """Return y = x W'ᵀ + bias."""
        weight, bias = self.linear.weight, self.linear.bias
        return doraxp.jax.dora_linear(x, weight, self.adapter, self.config, bias)

    def merged(self):
        """Return the `eqx.nn.Linear` that acts as this layer does."""
        weight = doraxp.jax.merge(self.linear.weight, self.adapter, self.config)
        return eqx.tree_at(lambda linear: linear.weight, self.linear, weight)


def train(name, model, is_trained, x, y, steps=500):
    """Return the model with a lower mean square error. `is_trained` marks what may change."""
    trained, frozen = eqx.partition(model, is_trained)
    optimizer = optax.adam(1e-2)

    def error(trained):
        return jnp.mean((jax.vmap(eqx.combine(trained, frozen))(x) - y) ** 2)

    @eqx.filter_jit
    def step(trained, state):
        loss, gradients = eqx.filter_value_and_grad(error)(trained)
        updates, state = optimizer.update(gradients, state)
        return eqx.apply_updates(trained, updates), state, loss

    losses, state = [], optimizer.init(trained)
    for _ in range(steps):
        trained, state, loss = step(trained, state)
        losses.append(float(loss))
    print(f"{name}: loss {losses[0]:.4f} to {losses[-1]:.6f}")
    return eqx.combine(trained, frozen)


def main():
    """Train, freeze, adapt, merge."""
    x = jnp.linspace(-1, 1, 64)[:, None]
    base = eqx.nn.MLP(1, 1, 32, depth=2, activation=jnp.tanh, key=jax.random.key(0))
    base = train("base", base, eqx.is_inexact_array, x, jnp.sin(3 * x))

    config = doraxp.Config(rank=1, alpha=2)
    adapters = [doraxp.init(layer.weight, config, seed=i) for i, layer in enumerate(base.layers)]
    layers = tuple(map(DoRALinear, base.layers, adapters, [config] * 3))
    model = with_layers(base, layers)
    is_trained = eqx.tree_at(
        lambda model: [layer.adapter for layer in model.layers],
        jax.tree.map(lambda leaf: False, model),
        [doraxp.Adapter(True, True, True)] * 3,
    )
    model = train("adapters", model, is_trained, x, jnp.sin(3 * x + 1))

    merged = with_layers(model, tuple(layer.merged() for layer in model.layers))
    off = jnp.max(jnp.abs(jax.vmap(merged)(x) - jax.vmap(model)(x)))
    print(f"merged: {off:.0e} off")


def with_layers(model, layers):
    """Return the network with other layers."""
    return eqx.tree_at(lambda model: model.layers, model, layers)


if __name__ == "__main__":
    main()
