"""Train DoRA in a Flax NNX network: `doraxp.jax.dora_linear` in a module, optax, merge.

    python examples/flax_nnx.py

The base is random and frozen. Its adapters learn sin(3x).
"""

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

    def parts(self):
        """Return W, the adapter and the config."""
        adapter = doraxp.Adapter(self.lora_a[...], self.lora_b[...], self.magnitude[...])
        return self.linear.kernel[...].T, adapter, self.config

    def __call__(self, x):
        """Return y = x W'ᵀ + bias."""
        return doraxp.jax.dora_linear(x, *self.parts(), self.linear.bias[...])

    def merged(self):
        """Return the `nnx.Linear` that acts as this layer does."""
        self.linear.kernel[...] = doraxp.jax.merge(*self.parts()).T
        return self.linear


@nnx.jit
def step(model, optimizer, x, y):
    """Change the adapters, and return the loss from before."""
    loss, gradients = nnx.value_and_grad(
        lambda model: jnp.mean((model(x) - y) ** 2), argnums=nnx.DiffState(0, Dora)
    )(model)
    optimizer.update(model, gradients)
    return loss


def main():
    """Train the adapters, then compare the merged network with them."""
    x, rngs, config = jnp.linspace(-1, 1, 64)[:, None], nnx.Rngs(0), doraxp.Config(rank=1)
    linears = [nnx.Linear(*sizes, rngs=rngs) for sizes in ((1, 32), (32, 32), (32, 1))]
    first, second, third = (DoRALinear(linear, config, i) for i, linear in enumerate(linears))
    model = nnx.Sequential(first, jnp.tanh, second, jnp.tanh, third)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=Dora)
    losses = [float(step(model, optimizer, x, jnp.sin(3 * x))) for _ in range(500)]
    print(f"loss at step 0: {losses[0]:.6f}\nloss at step 499: {losses[-1]:.6f}")

    adapted = model(x)
    merged = nnx.Sequential(first.merged(), jnp.tanh, second.merged(), jnp.tanh, third.merged())
    print(f"merged: {jnp.max(jnp.abs(merged(x) - adapted)):.0e} off")


if __name__ == "__main__":
    main()
