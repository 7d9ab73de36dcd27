"""Fine-tune a Flax NNX network with DoRA: `doraxp.jax.dora_linear` in a module, optax, merge.

    python examples/flax_nnx.py

A network learns sin(3x), is frozen, and is adapted to sin(3x + 1).
"""

from __future__ import annotations

import jax.numpy as jnp
import optax
from flax import nnx

import doraxp
import doraxp.jax


class Dora(nnx.Variable):
    """A trained parameter of an adapter. The base's are of the type `nnx.Param`."""


class DoRALinear(nnx.Module):
    """A frozen `nnx.Linear`, whose kernel is (in, out), with an adapter."""

    def __init__(self, linear, config, seed):
        self.linear, self.config = linear, config
        a, b, m = doraxp.init(linear.kernel[...].T, config, seed=seed)
        self.lora_a, self.lora_b, self.magnitude = Dora(a), Dora(b), Dora(m)

    def adapter(self):
        """Return the arrays of the adapter."""
        return doraxp.Adapter(self.lora_a[...], self.lora_b[...], self.magnitude[...])

    def __call__(self, x):
        """Return y = x W'ᵀ + bias."""
        weight, bias = self.linear.kernel[...].T, self.linear.bias[...]
        return doraxp.jax.dora_linear(x, weight, self.adapter(), self.config, bias)

    def merged(self):
        """Return the `nnx.Linear` that acts as this layer does."""
        weight = self.linear.kernel[...].T
        self.linear.kernel[...] = doraxp.jax.merge(weight, self.adapter(), self.config).T
        return self.linear


def train(model, kind, x, y, steps=500):
    """Lower the mean square error by the parameters of one type. Print the first and last."""
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=kind)

    def error(model):
        return jnp.mean((model(x) - y) ** 2)

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(error, argnums=nnx.DiffState(0, kind))(model)
        optimizer.update(model, gradients)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(steps)]
    print(f"{kind.__name__}: loss {losses[0]:.4f} to {losses[-1]:.6f}")


def main():
    """Train, freeze, adapt, merge."""
    x, rngs = jnp.linspace(-1, 1, 64)[:, None], nnx.Rngs(0)
    linears = [nnx.Linear(*sizes, rngs=rngs) for sizes in ((1, 32), (32, 32), (32, 1))]
    train(network(linears), nnx.Param, x, jnp.sin(3 * x))

    config = doraxp.Config(rank=1, alpha=2)
    adapted = [DoRALinear(linear, config, seed) for seed, linear in enumerate(linears)]
    train(network(adapted), Dora, x, jnp.sin(3 * x + 1))

    y = network(adapted)(x)
    merged = network([layer.merged() for layer in adapted])(x)
    print(f"merged: {jnp.max(jnp.abs(merged - y)):.0e} off")


def network(layers):
    """Return three layers with tanh between them."""
    first, second, third = layers
    return nnx.Sequential(first, jnp.tanh, second, jnp.tanh, third)


if __name__ == "__main__":
    main()
