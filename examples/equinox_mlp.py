"""Train DoRA in an Equinox network: `doraxp.jax.dora_linear` in a module, optax, merge.

    python examples/equinox_mlp.py

The base is random and frozen. Its adapters learn sin(3x).
"""

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


def with_layers(network, layers):
    """Return the network with other layers."""
    return eqx.tree_at(lambda network: network.layers, network, tuple(layers))


@eqx.filter_jit
def loss_and_gradients(adapters, base, config, x, y):
    """Return the mean square error, and its gradients by the adapters alone."""

    def error(adapters):
        network = with_layers(base, map(DoRALinear, base.layers, adapters, [config] * 3))
        return jnp.mean((jax.vmap(network)(x) - y) ** 2)

    return jax.value_and_grad(error)(adapters)


def main():
    """Train the adapters, then compare the merged network with them."""
    x, config = jnp.linspace(-1, 1, 64)[:, None], doraxp.Config(rank=1)
    base = eqx.nn.MLP(1, 1, 32, depth=2, activation=jnp.tanh, key=jax.random.key(0))
    adapters = [doraxp.init(layer.weight, config, seed=i) for i, layer in enumerate(base.layers)]
    optimizer = optax.adam(1e-2)
    state = optimizer.init(adapters)
    for step in range(500):
        loss, gradients = loss_and_gradients(adapters, base, config, x, jnp.sin(3 * x))
        updates, state = optimizer.update(gradients, state)
        adapters = optax.apply_updates(adapters, updates)
        if step in (0, 499):
            print(f"loss at step {step}: {loss:.6f}")

    layers = list(map(DoRALinear, base.layers, adapters, [config] * 3))
    adapted = jax.vmap(with_layers(base, layers))(x)
    merged = jax.vmap(with_layers(base, (layer.merged() for layer in layers)))(x)
    print(f"merged: {jnp.max(jnp.abs(merged - adapted)):.0e} off")


if __name__ == "__main__":
    main()
